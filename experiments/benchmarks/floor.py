"""The bare matrix products of a training step, and their time on this machine: a floor for the time of a step.

A variational layer with inputs X [m, k], means W and variances V [k, n] takes two products forward, X W and X^2 V, two for the gradients of
W and V, and two for the gradient of X where it is needed. A convolution counts as the products of its patches, where m is the number of
positions in all examples.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax

# The least duration of one timing, which repeats the products; the least duration of all timings of a layer, and their least number.
_SECONDS, _ALL_SECONDS, _FEWEST = 0.02, 0.4, 3


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of one layer with inputs X [m, k] and kernels [k, n].

    Attributes:
      m: The number of examples, times the number of positions of a convolution.
      k: The number of inputs, or of entries of a patch.
      n: The number of outputs.
      input_gradient: True if the gradient of X is needed. A first dense layer needs it, since its scales multiply its inputs; a first
        convolution does not.
    """

    m: int
    k: int
    n: int
    input_gradient: bool

    @property
    def operations(self) -> int:
        """The number of multiplications and additions."""
        return 2 * self.m * self.k * self.n * (6 if self.input_gradient else 4)


def products_of(model: nn.Module, images: jax.ShapeDtypeStruct) -> list[Products]:
    """The products of every variational layer in a training step.

    Args:
      model: The network.
      images: The shape and dtype of a batch of images.
    """
    found: list[Products] = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, bcdl_jax.Conv | bcdl_jax.Dense):
            window = layer.kernel_size if isinstance(layer, bcdl_jax.Conv) else ()
            patch = math.prod(window if isinstance(window, Sequence) else (window,)) * args[0].shape[-1]
            dense = isinstance(layer, bcdl_jax.Dense)
            found.append(Products(math.prod(outputs.shape[:-1]), patch, outputs.shape[-1], dense or bool(found)))
        return outputs

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), images)
    return found


def floor_seconds(layers: Sequence[Products], dtype: str, device: str) -> list[dict[str, float]]:
    """Measures the products of a step with each available library. The fastest of several timings counts.

    Args:
      layers: The products of the layers, from ``products_of``.
      dtype: The dtype of the products, "float32" or "bfloat16".
      device: The kind of device, "cpu" or "gpu".

    Returns:
      The seconds of each layer by library: "XLA", "torch" if it is installed (on a GPU with CUDA), and "numpy" on a CPU in float32.
    """
    return [{library: _best(run) for library, run in _libraries(layer, dtype, device).items()} for layer in layers]


def _pairs(arrays: Sequence[Any], input_gradient: bool) -> list[tuple[Any, Any]]:
    """The factors of all products of a layer. The arrays may be of any library."""
    inputs, squares, means, variances, mean_slopes, variance_slopes = arrays
    pairs = [(inputs, means), (squares, variances), (inputs.T, mean_slopes), (squares.T, variance_slopes)]
    return pairs + ([(mean_slopes, means.T), (variance_slopes, variances.T)] if input_gradient else [])


def _libraries(layer: Products, dtype: str, device: str) -> dict[str, Callable[[int], None]]:
    """Functions by library. Each repeats the layer's products a given number of times and waits for the last one."""
    rng = np.random.default_rng(0)
    shapes = [(layer.m, layer.k)] * 2 + [(layer.k, layer.n)] * 2 + [(layer.m, layer.n)] * 2
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    libraries = {"XLA": _with_xla([jnp.asarray(array, dtype) for array in arrays], layer.input_gradient)}
    if device == "cpu" and dtype == "float32":
        libraries["numpy"] = _into_buffers(_pairs(arrays, layer.input_gradient), np.matmul, lambda: None)
    if importlib.util.find_spec("torch") is not None:
        import torch

        if device == "cpu" or torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")  # XLA does the same on a GPU. On a CPU it has no effect.
            where = torch.device("cpu" if device == "cpu" else "cuda")
            tensors = [torch.from_numpy(array).to(where, getattr(torch, dtype)) for array in arrays]
            wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
            libraries["torch"] = _into_buffers(_pairs(tensors, layer.input_gradient), torch.mm, wait)
    return libraries


def _with_xla(arrays: Sequence[jax.Array], input_gradient: bool) -> Callable[[int], None]:
    """The function of XLA, with all products in one program."""

    def products(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return [left @ right for left, right in _pairs(arrays, input_gradient)]

    compiled = jax.jit(products).lower(arrays).compile()

    def run(times: int) -> None:
        for _ in range(times):
            results = compiled(arrays)
        jax.block_until_ready(results)

    return run


def _into_buffers(
    pairs: Sequence[tuple[Any, Any]], matmul: Callable[..., Any], wait: Callable[[], None]
) -> Callable[[int], None]:
    """The function of a library that writes its results into the same buffers each time, so that it allocates no memory."""
    buffers = [matmul(left, right) for left, right in pairs]

    def run(times: int) -> None:
        for _ in range(times):
            for (left, right), buffer in zip(pairs, buffers, strict=True):
                matmul(left, right, out=buffer)
        wait()

    return run


def _best(run: Callable[[int], None]) -> float:
    """The least time of one repetition of ``run``, in seconds."""
    run(1)
    start = time.perf_counter()
    run(1)
    times = max(1, round(_SECONDS / max(time.perf_counter() - start, 1e-6)))
    measured: list[float] = []
    while len(measured) < _FEWEST or sum(measured) * times < _ALL_SECONDS:
        start = time.perf_counter()
        run(times)
        measured.append((time.perf_counter() - start) / times)
    return min(measured)
