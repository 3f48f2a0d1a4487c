"""Running a network elsewhere: as ONNX, for onnxruntime and whatever else reads it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bcdl_jax._atomic_file import check_writable, write_atomically
from bcdl_jax.export.stablehlo import any_batch_or_error, inputs_of_any_batch
from bcdl_jax.graph.program import CUSTOM, Rule, Step, evaluate_elementwise, trace

PyTree = Any


def export_onnx(path: str | os.PathLike[str], apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> int:
    """Writes a network, its params inside, as ONNX. Needs ``jax2onnx`` (``pip install -e '.[onnx]'``).

    Args:
      path: the file. It is written under a temporary name and then renamed.
      apply: ``apply(params, *inputs)``, such as the small function of ``shrink``.
      params: its params.
      example_inputs: a tuple of inputs, or a single array, for their shapes and dtypes. The leading axis of the first array, wherever it stands in
        front, becomes a batch of any size.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: an input has no leading axis, or the network cannot run at any batch size.
      OSError: the file cannot be written.
      ModuleNotFoundError: jax2onnx is not installed.
      NotImplementedError: the network uses a primitive that has no counterpart in ONNX, or whose conversion fails; what was said of it follows.
    """
    try:
        from jax2onnx import to_onnx  # takes seconds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("export_onnx needs jax2onnx: pip install -e '.[onnx]'.") from error
    check_writable(path)
    inputs = inputs_of_any_batch(example_inputs)
    # Traced before the conversion, which puts primitives of its own in the place of many functions of JAX and Flax.
    with any_batch_or_error():
        program = trace(lambda *arguments: apply(params, *arguments), *inputs)
    rules: dict[str, Rule] = {
        "conv_general_dilated": _convolution,
        "reduce_window_max": _max_pool,
        "reduce_window_sum": _sum_pool,
        **dict.fromkeys(CUSTOM, _without_custom_derivative),
    }

    def run(*leaves: jax.Array) -> PyTree:
        return program.run(leaves, rules)

    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of types that no reader needs
    try:
        model = to_onnx(run, jax.tree.leaves(inputs), model_name="network")
    except Exception as error:
        names = ", ".join(sorted({step.name for step in program.steps}))
        raise NotImplementedError(
            f"The network could not be written as ONNX; it consists of {names}. {error}"
        ) from error
    finally:
        logger.setLevel(level)
    data = model.SerializeToString()
    write_atomically(path, data)
    return len(data)


def _without_custom_derivative(step: Step, *operands: jax.Array) -> Any:
    inside = step.params["call_jaxpr"]
    if not step.elementwise or len(step.outputs) != 1:
        return None
    shape = max((operand.shape for operand in operands), key=len)
    return evaluate_elementwise(inside.jaxpr, inside.consts, operands, shape)[0]


def _convolution(step: Step, values: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """A three-dimensional convolution, which jax2onnx does not know, as a two-dimensional one that reads all planes of the window as channels."""
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


def _max_pool(step: Step, values: jax.Array) -> jax.Array | None:
    """The primitive pools over all axes; pooling over the inner ones alone is what ONNX knows."""
    return _pool(step, values, nn.max_pool, -jnp.inf)


def _sum_pool(step: Step, values: jax.Array) -> jax.Array | None:
    pooled = _pool(step, values, nn.avg_pool, 0)
    return None if pooled is None else pooled * math.prod(step.params["window_dimensions"])


def _pool(step: Step, values: jax.Array, pool: Callable[..., jax.Array], neutral: float) -> jax.Array | None:
    params = step.params
    window, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    dilations = {*params["base_dilation"], *params.get("window_dilation", (1,))}
    if dilations != {1} or any(min(pair) < 0 for pair in padding) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise NotImplementedError(f"{step.name} of {values.dtype} with dilation or negative padding.")
    others = [axis for axis in range(values.ndim) if (window[axis], strides[axis], *padding[axis]) == (1, 1, 0, 0)]
    others = [others[0], others[-1]] if len(others) > 1 else []
    axes = [axis for axis in range(values.ndim) if axis not in others]
    if not others or not axes:
        raise NotImplementedError(f"{step.name} over all of {values.ndim} axes.")
    order = [others[0], *axes, others[1]]
    if any(map(any, padding)):  # jax2onnx passes over the padding of a pool
        values = jnp.pad(values, padding, constant_values=neutral)
    pooled = pool(
        values.transpose(order),
        window_shape=tuple(window[axis] for axis in axes),
        strides=tuple(strides[axis] for axis in axes),
    )
    return pooled.transpose([order.index(axis) for axis in range(values.ndim)])
