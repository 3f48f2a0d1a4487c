"""The choice between the form of a computation for a CPU and the form for an accelerator. Both forms agree up to rounding."""

from __future__ import annotations

import jax


def on_cpu() -> bool:
    """Whether computations run on a CPU by default. There the library uses other forms of three computations:

    convolutions that sample: matrix products with patches, whose gradients are several times as fast there;
    max pooling: a form whose gradient needs no scatter;
    many seeds: a loop over them, since one seed fills a CPU.
    """
    return jax.default_backend() == "cpu"
