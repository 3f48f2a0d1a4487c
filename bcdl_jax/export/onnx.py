"""Networks as ONNX, for onnxruntime and other runtimes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bcdl_jax._atomic_file import check_writable, write_atomically
from bcdl_jax._tree import PyTree
from bcdl_jax.export.symbolic_batch import batch_size_errors, symbolic_inputs
from bcdl_jax.graph.primitives import CUSTOM, evaluate_elementwise
from bcdl_jax.graph.program import Rule, Step
from bcdl_jax.graph.tracing import trace


def export_onnx(path: str | os.PathLike[str], apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> int:
    """Writes a network with its params as ONNX. Needs ``jax2onnx`` (``pip install -e '.[onnx]'``).

    Args:
      path: The file. It is written under a temporary name and then renamed.
      apply: The network, ``apply(params, *inputs)``, such as the small function from ``shrink``.
      params: The params of the network.
      example_inputs: A tuple of inputs, or a single array, for their shapes and dtypes. The first array begins with the batch axis. It and
        each other leading axis of the same length get a variable size.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: The first input has no leading axis, or the network does not run at every batch size.
      OSError: The file cannot be written.
      ModuleNotFoundError: The package jax2onnx is not installed.
      NotImplementedError: A primitive of the network has no counterpart in ONNX, or its conversion fails.
    """
    try:
        from jax2onnx import to_onnx  # This import takes seconds.
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("export_onnx needs jax2onnx: pip install -e '.[onnx]'.") from error
    check_writable(path)
    inputs = symbolic_inputs(example_inputs)
    # jax2onnx replaces many functions of JAX and Flax by primitives of its own, so the network is traced before the conversion.
    with batch_size_errors():
        program = trace(lambda *arguments: apply(params, *arguments), *inputs)
    rules: dict[str, Rule] = {
        "conv_general_dilated": _convolution,
        "reduce_window_max": _max_pool,
        "reduce_window_sum": _sum_pool,
        **dict.fromkeys(CUSTOM, _without_custom_derivative),
    }

    def run(*leaves: jax.Array) -> PyTree:
        return program.run(leaves, rules)

    try:
        with _only_errors_logged("onnx_ir"):
            model = to_onnx(run, jax.tree.leaves(inputs), model_name="network")
    except Exception as error:
        names = ", ".join(sorted({step.name for step in program.steps}))
        raise NotImplementedError(
            f"The network could not be converted to ONNX; its primitives are {names}. {error}"
        ) from error
    data = model.SerializeToString()
    write_atomically(path, data)
    return len(data)


@contextlib.contextmanager
def _only_errors_logged(name: str) -> Iterator[None]:
    """Silences the warnings of a logger: onnx_ir warns of types that no reader needs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _without_custom_derivative(step: Step, *operands: jax.Array) -> Any:
    """Runs an elementwise function with a custom derivative as its primitives: ONNX has no such functions."""
    inside = step.params["call_jaxpr"]
    if not step.elementwise or len(step.outputs) != 1:
        return None
    shape = max((operand.shape for operand in operands), key=len)
    return evaluate_elementwise(inside.jaxpr, inside.consts, operands, shape)[0]


def _convolution(step: Step, values: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """Runs a three-dimensional convolution as a two-dimensional one, which reads the planes of the window as channels.

    jax2onnx does not support three-dimensional convolutions.
    """
    params = step.params
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"]
    plain = params["batch_group_count"] == params["lhs_dilation"][0] == 1
    if values.ndim != 5 or not plain or min(params["padding"][0]) < 0:
        return None
    values = values.transpose([numbers.lhs_spec[axis] for axis in (0, 2, 3, 4, 1)])
    kernel = kernel.transpose([numbers.rhs_spec[axis] for axis in (2, 3, 4, 1, 0)])
    window, stride, dilation = kernel.shape[0], params["window_strides"][0], params["rhs_dilation"][0]
    values = jnp.pad(values, ((0, 0), params["padding"][0], (0, 0), (0, 0), (0, 0)))
    planes = (values.shape[1] - (window - 1) * dilation - 1) // stride + 1
    taps = [
        lax.slice_in_dim(values, first, first + (planes - 1) * stride + 1, stride, axis=1)
        for first in range(0, window * dilation, dilation)
    ]
    channels = values.shape[-1] // groups
    grouped = jnp.concatenate([tap.reshape(*tap.shape[:-1], groups, channels) for tap in taps], -1)
    outputs = lax.conv_general_dilated(
        grouped.reshape(-1, *values.shape[2:4], groups * channels * window),
        jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1]),
        params["window_strides"][1:],
        params["padding"][1:],
        params["lhs_dilation"][1:],
        params["rhs_dilation"][1:],
        ("NHWC", "HWIO", "NHWC"),
        groups,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    outputs = outputs.reshape(-1, planes, *outputs.shape[1:])
    place = dict(zip((numbers.out_spec[axis] for axis in (0, 2, 3, 4, 1)), range(5), strict=True))
    return outputs.transpose([place[axis] for axis in range(5)])


def _max_pool(step: Step, values: jax.Array) -> jax.Array:
    return _pool(step, values, nn.max_pool, -jnp.inf)


def _sum_pool(step: Step, values: jax.Array) -> jax.Array:
    return _pool(step, values, nn.avg_pool, 0) * math.prod(step.params["window_dimensions"])


def _pool(step: Step, values: jax.Array, pool: Callable[..., jax.Array], neutral: float) -> jax.Array:
    """Runs a window reduction over all axes as a pooling over the inner axes, the only one that ONNX has.

    Args:
      step: The window reduction.
      values: Its operand.
      pool: The pooling function of Flax.
      neutral: The value that padding adds to a window without effect.
    """
    params = step.params
    window, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    dilations = {*params["base_dilation"], *params.get("window_dilation", (1,))}
    if dilations != {1} or any(min(pair) < 0 for pair in padding) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise NotImplementedError(
            f"{step.name} of {values.dtype} cannot be converted; it must be of floats, without dilation and without negative padding."
        )
    others = [axis for axis in range(values.ndim) if (window[axis], strides[axis], *padding[axis]) == (1, 1, 0, 0)]
    others = [others[0], others[-1]] if len(others) > 1 else []
    axes = [axis for axis in range(values.ndim) if axis not in others]
    if not others or not axes:
        raise NotImplementedError(
            f"{step.name} of {values.ndim} axes with window {window} cannot be converted; it needs two axes without pooling and one more."
        )
    order = [others[0], *axes, others[1]]
    if any(map(any, padding)):  # jax2onnx ignores the padding of a pooling.
        values = jnp.pad(values, padding, constant_values=neutral)
    pooled = pool(
        values.transpose(order),
        window_shape=tuple(window[axis] for axis in axes),
        strides=tuple(strides[axis] for axis in axes),
    )
    return pooled.transpose([order.index(axis) for axis in range(values.ndim)])
