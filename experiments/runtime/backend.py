"""The kind of device that computes. The experiments choose the forms of their computations by it."""

from __future__ import annotations

import jax

import bcdl_jax


def on_cpu() -> bool:
    """Whether computations run on a CPU by default. There the experiments use other forms of three computations:

    batch norms: the channels first in memory, so that no gradient of a convolution is copied (``networks.layers``);
    shrinking during training: single channels, again and again, instead of multiples of eight once (``pipeline.phase``);
    the benchmark of inference: ``bcdl_jax.for_cpu`` and onnxruntime as further engines (``benchmarks.contestants``).
    """
    return bcdl_jax.train.on_cpu()


def name() -> str:
    """The name of the kind of device that computes by default: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()
