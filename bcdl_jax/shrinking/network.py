"""Shrinks a network that holds zeros to a smaller network with the same outputs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree, named_arrays
from bcdl_jax.graph.batch_size import trace_for_any_batch
from bcdl_jax.graph.counting import multiply_adds
from bcdl_jax.graph.data_flow import analyze
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.graph.program import Program, compile_quickly
from bcdl_jax.graph.tracing import trace
from bcdl_jax.shrinking.cutting import cut_leaf
from bcdl_jax.shrinking.layer_layouts import layer_layouts
from bcdl_jax.shrinking.layouts import kept_indices
from bcdl_jax.shrinking.plan import make_plan
from bcdl_jax.shrinking.quantized_params import takes_quantized_layers
from bcdl_jax.shrinking.reasons import reasons_for_kept
from bcdl_jax.shrinking.report import LeafReport, ShrinkReport, warn_of_empty_layers
from bcdl_jax.shrinking.small_function import small_function


def shrink(
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    multiple_of: int = 1,
    tolerance: float | None = None,
) -> tuple[Callable[..., PyTree], PyTree, ShrinkReport]:
    """Removes the channels of a network that its zeros make superfluous.

    A channel is removed if it does not depend on the inputs, or if no result depends on it. The constant of a removed channel is added to
    the output of the layer that reads it. If that layer pads with zeros, a channel with a constant other than 0 stays.

    The function is traced, and each of its primitives is followed channel by channel, also within loops, so ``shrink`` works for any kind
    of model. The operands of a primitive without a rule, such as an FFT, stay whole.

    Args:
      apply: The network: any JAX function ``apply(params, *inputs)``. For Linen: ``lambda params, x: model.apply({"params": params}, x)``.
      params: A tree of arrays with zeros, such as pruned params or posteriors with masks. All values must be finite. A variational or
        quantised layer is cut as a whole: arrays that ``apply`` does not read, such as variances, keep the same inputs and outputs.
      example_inputs: The inputs: a tuple, or a single array. Their leading axis is the batch. Shapes and dtypes matter; the values serve for
        the final check. The small function takes any batch size if ``apply`` does.
      multiple_of: The divisor of kept widths. Each width is rounded up to a multiple of it.
      tolerance: The largest allowed difference of the outputs on the example inputs, relative to the largest output. The default is the
        square root of the precision of the least precise dtype in the network: 0.0003 for float32, 0.09 for bfloat16.

    Returns:
      The small function ``small_apply(small_params, *inputs)``, the small params in a tree of the same structure, and a report. The small
      function works under ``jit``, ``vmap`` and ``grad``. It also takes small params whose posteriors ``reduce_precision`` made quantised
      layers. The constants of removed channels do not change if the small network is trained.

    Raises:
      ValueError: ``multiple_of`` or ``tolerance`` is out of range, or the outputs differ by more than the tolerance. The small function
        raises it if an input has another shape or dtype than the example, apart from the batch size, or if ``apply`` runs other operations
        at its batch size.

    Warns:
      UserWarning: Nothing is left of a layer, or ``apply`` supports batch sizes that the small function does not support.
    """
    small_apply, small_params, report = shrink_at_any_batch_size(
        apply, params, example_inputs, multiple_of=multiple_of, tolerance=tolerance
    )
    if report.remark:
        warnings.warn(report.remark, stacklevel=2)
    return small_apply, small_params, report


def shrink_at_any_batch_size(
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    multiple_of: int = 1,
    tolerance: float | None = None,
) -> tuple[Callable[..., PyTree], PyTree, ShrinkReport]:
    """``shrink`` without a warning about batch sizes, for functions that use one batch size alone."""
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; it must be an int of at least 1.")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be 0 or more.")
    inputs = as_inputs(example_inputs)
    leaves, structure = jax.tree.flatten(params)
    paths = [name for name, _ in named_arrays(params)]

    network = trace_for_any_batch(apply, params, inputs)
    numbers = network.program.inputs[: len(leaves)]
    analysis = analyze(network.program, leaves, network.moving)
    plan = make_plan(network.program, analysis, network.moving, multiple_of)
    layouts = list(plan.layouts)
    for number, layout in zip(numbers, layer_layouts(params, [layouts[number] for number in numbers]), strict=True):
        layouts[number] = layout
    plan = dataclasses.replace(plan, layouts=tuple(layouts))
    kept = [kept_indices(plan.layouts[number], np.shape(leaf)) for number, leaf in zip(numbers, leaves, strict=True)]
    small_leaves = [cut_leaf(leaf, each) for leaf, each in zip(leaves, kept, strict=True)]
    small_params = jax.tree.unflatten(structure, small_leaves)
    small_apply = takes_quantized_layers(small_function(apply, params, network, plan, paths), small_params)

    before, after = (
        compile_quickly(function, tree, *inputs)(tree, *inputs)
        for function, tree in ((apply, params), (small_apply, small_params))
    )
    shapes = [jnp.shape(leaf) for leaf in leaves]
    reasons = reasons_for_kept(network.program, analysis, plan, numbers)
    entries = zip(paths, shapes, map(jnp.shape, small_leaves), kept, reasons, strict=True)
    report = ShrinkReport(
        leaves=tuple(
            LeafReport(path, old, new, each, *(reason or (None, 0))) for path, old, new, each, reason in entries
        ),
        bytes=(sum(jnp.asarray(leaf).nbytes for leaf in leaves), sum(leaf.nbytes for leaf in small_leaves)),
        multiply_adds=(
            multiply_adds(trace(apply, params, *inputs)),
            multiply_adds(trace(small_apply, small_params, *inputs)),
        ),
        difference=_largest_difference(before, after, tolerance, network.program),
        structure=structure,
        remark=None if network.limit is None else f"The small function {network.limit}",
    )
    # A scalar is kept in any case, so it does not make its layer one of which something is left.
    warn_of_empty_layers(report, [shape != () and 0 not in shape for shape in shapes])
    return small_apply, small_params, report


def _largest_difference(before: PyTree, after: PyTree, tolerance: float | None, program: Program) -> float:
    """The largest absolute difference between two trees of outputs.

    Raises:
      ValueError: The difference is larger than the tolerance.
    """
    largest = 0.0
    floats = [shape.dtype for shape in program.shapes if jnp.issubdtype(shape.dtype, jnp.floating)]
    precision = max((float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(old.dtype, jnp.inexact) or not old.size:
            continue
        allowed = float(np.sqrt(precision)) if tolerance is None else tolerance
        difference = float(jnp.max(jnp.abs(old - new)))
        if not difference <= allowed * float(jnp.max(jnp.abs(old))):
            raise ValueError(
                f"The shrunk network differs from the given network by {difference:.3g} on the example inputs. The largest output is "
                f"{float(jnp.max(jnp.abs(old))):.3g}, and the tolerance is {allowed:.3g} of it. All params and outputs must be finite."
            )
        largest = max(largest, difference)
    return largest
