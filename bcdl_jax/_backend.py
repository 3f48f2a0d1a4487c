"""The one place that asks which kind of device computes.

A CPU and an accelerator want some computations in different forms. All forms give the same results, to rounding.
"""

from __future__ import annotations

import jax


def on_cpu() -> bool:
    """Whether computations run on a CPU by default. It decides on:

    convolutions that sample: matrix products with patches, whose gradients are several times as fast there;
    max pooling: a form whose gradient needs no scatter;
    many seeds: a loop over them, since one seed fills a CPU.
    """
    return jax.default_backend() == "cpu"
