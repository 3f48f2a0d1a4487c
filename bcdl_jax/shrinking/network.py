"""Shrinking: from a network that holds zeros to a smaller network that computes the same."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import array_names, module_name
from bcdl_jax.graph.data_flow import Analysis, analyze, wholly_unknown
from bcdl_jax.graph.program import Program, compile_quickly, dtype_of, multiply_adds, trace
from bcdl_jax.shrinking.execute import Axis, Machine, Plan, make_plan

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What became of one array of the params.

    Attributes:
      path: where it stands, such as "Dense_0/kernel".
      before: its shape.
      after: its shape in the small params.
      kept: for each axis the indices that were kept, int64, ascending.
      reason: why a slice of zeros could not be removed; None if there is none left.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    reason: str | None


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
    """What ``shrink`` did.

    Attributes:
      leaves: one entry per array of the params, in the order of ``jax.tree.leaves``.
      bytes: of the params, before and after.
      multiply_adds: of all matrix products and convolutions on the example inputs, before and after.
      difference: largest absolute difference between the outputs before and after on the example inputs.
      structure: of the params.
    """

    leaves: tuple[LeafReport, ...]
    bytes: tuple[int, int]
    multiply_adds: tuple[int, int]
    difference: float
    structure: Any

    def __str__(self) -> str:
        width = max([len(leaf.path) for leaf in self.leaves], default=0)
        lines = [
            f"{leaf.path:<{width}}  {_by(leaf.before)} -> {_by(leaf.after)}" + f"  ({leaf.reason})" * bool(leaf.reason)
            for leaf in self.leaves
        ]
        for name, (before, after) in (("bytes", self.bytes), ("multiply-adds", self.multiply_adds)):
            lines.append(f"{name}: {before:,} -> {after:,}" + (f" ({before / after:.1f}x)" if after else ""))
        return "\n".join([*lines, f"largest difference of the outputs: {self.difference:.2g}"])


def shrink(
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    multiple_of: int = 1,
    tolerance: float | None = None,
) -> tuple[Callable[..., PyTree], PyTree, ShrinkReport]:
    """Removes from a network whatever its zeros make superfluous.

    A channel goes when it is constant whatever the input (a constant is folded into what reads it, except across zero padding) or when
    nobody reads it. Nothing needs to be known of the model's class: the function is traced, and its primitives are followed
    channel by channel. What is not understood (a ``scan``, say) is left whole.

    Args:
      apply: ``apply(params, *inputs)``, any JAX function. Linen: ``lambda params, x: model.apply({"params": params}, x)``.
      params: tree of arrays, with the zeros that pruning left (variational_layers with masks among them). Values are taken to be finite.
      example_inputs: the inputs, a tuple, or a single array. Shape and dtype matter, and the values for the final check. The leading axis is
        the batch; the small function takes any batch size if ``apply`` does.
      multiple_of: kept widths are rounded up to a multiple of it.
      tolerance: how much the outputs may differ on the example inputs, relative to the largest one; the square root of the
        precision of their dtype by default (0.0003 for float32).

    Returns:
      ``small_apply(small_params, *inputs)``, the small params (a tree of the same structure), and a report. The small
      function works under ``jit``, ``vmap`` and ``grad``; a constant that was folded no longer changes when the small net is trained.

    Raises:
      ValueError: ``multiple_of`` or ``tolerance`` is out of range, an input of the small function has another shape than the example
        (beyond the batch size), or the outputs differ by more than the tolerance.

    Warns:
      UserWarning: nothing is left of a layer.
    """
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; it must be an int of at least 1.")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be 0 or more.")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves, structure = jax.tree.flatten(params)
    paths = array_names([path for path, _ in jax.tree_util.tree_leaves_with_path(params)])

    program, examples, moving_axes, moving_constants = _trace_for_any_batch(apply, params, inputs)
    numbers = program.inputs[: len(leaves)]
    without = wholly_unknown(program, len(leaves))
    values = program.evaluate(*leaves, *jax.tree.leaves(examples), without=without)
    analysis = analyze(program, values, len(leaves), moving_axes, moving_constants)
    plan = make_plan(program, analysis, moving_axes, multiple_of)
    small_leaves = [_cut(leaf, _kept(plan, number, leaf)) for leaf, number in zip(leaves, numbers, strict=True)]
    small_params = jax.tree.unflatten(structure, small_leaves)
    small_apply = _small_function(apply, params, program, plan, analysis, moving_axes, moving_constants, paths)

    before, after = (
        compile_quickly(function, tree, *inputs)(tree, *inputs)
        for function, tree in ((apply, params), (small_apply, small_params))
    )
    report = ShrinkReport(
        leaves=tuple(
            LeafReport(path, leaf.shape, small.shape, _kept(plan, number, leaf), reason)
            for path, leaf, small, number, reason in zip(
                paths,
                map(jnp.asarray, leaves),
                small_leaves,
                numbers,
                _reasons(program, analysis, plan, numbers),
                strict=True,
            )
        ),
        bytes=(sum(jnp.asarray(leaf).nbytes for leaf in leaves), sum(leaf.nbytes for leaf in small_leaves)),
        multiply_adds=(
            multiply_adds(trace(apply, params, *inputs)),
            multiply_adds(trace(small_apply, small_params, *inputs)),
        ),
        difference=_difference(before, after, tolerance),
        structure=structure,
    )
    _warn_of_empty_layers(report, [analysis.facts[number].live.size > 0 for number in numbers])
    return small_apply, small_params, report


def cut(tree: PyTree, report: ShrinkReport) -> PyTree:
    """Cuts a parallel tree the way ``shrink`` cut the params.

    Args:
      tree: any tree. Each part of it that has the structure of the params (gradients; the moments in an optimiser's state) is cut, the rest is
        left as it is. If Flax variables were shrunk, with "params" among their collections, so is each part with the structure of "params".
      report: of ``shrink``.

    Raises:
      ValueError: an array of such a part has another shape than that of the params, or there is no such part.
    """

    def cut_leaf(entry: LeafReport, leaf: Any) -> jax.Array:
        if np.shape(leaf) != entry.before:
            raise ValueError(f"The array at {entry.path} has shape {np.shape(leaf)}; it must be {entry.before}.")
        return _cut(leaf, entry.kept)

    return _map_parts(cut_leaf, report, tree)


def expand(tree: PyTree, report: ShrinkReport, into: PyTree) -> PyTree:
    """Undoes ``cut``: writes what was kept back to where it came from.

    Args:
      tree: a tree that ``cut`` (or ``shrink``) made, perhaps trained since.
      report: of ``shrink``.
      into: the tree before it was cut, which gives the values of what was cut away.

    Returns:
      A tree with the shapes of ``into``; what ``cut`` leaves as it is comes from ``tree``.

    Raises:
      ValueError: an array has another shape than the report says, or there is nothing to expand.
    """

    def expand_leaf(entry: LeafReport, leaf: Any, whole: Any) -> jax.Array:
        for given, shape in ((leaf, entry.after), (whole, entry.before)):
            if np.shape(given) != shape:
                raise ValueError(f"The array at {entry.path} has shape {np.shape(given)}; it must be {shape}.")
        if entry.before == entry.after:
            return jnp.asarray(leaf)
        expanded = np.array(whole)
        expanded[np.ix_(*entry.kept)] = np.asarray(leaf)
        return jnp.asarray(expanded)

    return _map_parts(expand_leaf, report, tree, into)


def _map_parts(function: Callable[..., Any], report: ShrinkReport, tree: PyTree, *others: PyTree) -> PyTree:
    """Maps ``function(entry of the report, leaf, leaves of the others)`` over each part of the trees with the structure of the params
    that were shrunk; what lies outside such parts is taken from the first tree."""
    places = jax.tree.unflatten(report.structure, range(len(report.leaves)))
    collection = places.get("params") if isinstance(places, Mapping) else None
    parts = {jax.tree.structure(part): jax.tree.leaves(part) for part in (collection, places) if part is not None}
    found = False

    def map_part(part: PyTree, *other_parts: PyTree) -> PyTree:
        nonlocal found
        structure: Any = jax.tree.structure(part)
        if structure not in parts:
            return part
        found = True
        leaves = zip(parts[structure], jax.tree.leaves(part), *map(structure.flatten_up_to, other_parts), strict=True)
        return jax.tree.unflatten(structure, [function(report.leaves[number], *rest) for number, *rest in leaves])

    result = jax.tree.map(map_part, tree, *others, is_leaf=lambda part: jax.tree.structure(part) in parts)
    if not found:
        raise ValueError(
            "tree has no part with the structure of the params that were shrunk, so there is nothing to cut or expand."
        )
    return result


def _trace_for_any_batch(
    apply: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]
) -> tuple[Program, PyTree, list[frozenset[int]], frozenset[int]]:
    """The program at a batch of two, such a batch, per value the axes that follow the batch size, and the literals that do."""
    leading = [np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs) if np.ndim(leaf)]

    def resized(size: int) -> PyTree:
        def cut(leaf: Any) -> Any:
            is_batch = np.ndim(leaf) and np.shape(leaf)[0] == leading[0]
            return jnp.take(leaf, np.arange(size) % leading[0], axis=0) if is_batch else leaf

        return jax.tree.map(cut, inputs)

    def traced(size: int) -> Program:
        return trace(apply, params, *resized(size))

    if leading and leading[0]:
        try:
            two, three = traced(2), traced(3)
        except Exception:  # whatever a model says to another batch size: then it is for this one alone
            pass
        else:
            given = traced(leading[0])
            if two.signature() == three.signature() == given.signature():
                axes = [
                    frozenset(
                        axis for axis, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len({*sizes}) > 1
                    )
                    for one, other in zip(two.shapes, three.shapes, strict=True)
                ]
                constants = frozenset(
                    number for number, value in two.constants.items() if not _same(value, three.constants[number])
                )
                if _fits(given, two, axes, constants):
                    return two, resized(2), axes, constants
    program = trace(apply, params, *inputs)
    return program, inputs, [frozenset()] * len(program.shapes), frozenset()


def _small_function(
    apply: Callable[..., PyTree],
    params: PyTree,
    program: Program,
    plan: Plan,
    analysis: Analysis,
    moving_axes: Sequence[frozenset[int]],
    moving_constants: frozenset[int],
    paths: Sequence[str],
) -> Callable[..., PyTree]:
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)), params)
    structure: Any = jax.tree.structure(params)
    count = structure.num_leaves
    shapes = [
        tuple(len(kept) for kept in _kept(plan, number, leaf))
        for number, leaf in zip(program.inputs, jax.tree.leaves(whole), strict=False)
    ]
    traces: dict[Any, Program] = {}

    def at_shapes(inputs: tuple[PyTree, ...]) -> Program:
        leaves, tree = jax.tree.flatten(inputs)
        structs = [jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for leaf in leaves]
        key = (tree, tuple((struct.shape, struct.dtype) for struct in structs))
        if key not in traces:
            inputs_before = program.inputs[count:]
            alike = len(structs) == len(inputs_before) and all(
                _is_like(struct, program.shapes[number], moving_axes[number])
                for struct, number in zip(structs, inputs_before, strict=True)
            )
            traced = trace(apply, whole, *jax.tree.unflatten(tree, structs)) if alike else None
            if traced is None or not _fits(traced, program, moving_axes, moving_constants):
                given = _described(structs, {})
                allowed = _described(
                    [program.shapes[number] for number in inputs_before],
                    {place: moving_axes[number] for place, number in enumerate(inputs_before)},
                )
                known = all(isinstance(size, int) for struct in structs for size in struct.shape)
                why = (
                    f" At {'this' if known else 'some other'} batch size the model computes something else than at the one "
                    "it was shrunk with."
                    if alike
                    else ""
                )
                raise ValueError(f"The inputs are {given}; this small function takes {allowed}.{why}")
            traces[key] = traced
        return traces[key]

    def small_apply(small_params: PyTree, *inputs: PyTree) -> PyTree:
        leaves = structure.flatten_up_to(small_params)
        for path, leaf, shape in zip(paths, leaves, shapes, strict=True):
            if np.shape(leaf) != shape:
                raise ValueError(f"small_params has {path} of shape {np.shape(leaf)}; it must be {shape}.")
        traced = at_shapes(inputs)
        machine = Machine(traced, plan, analysis.facts, moving_axes)
        results = machine.run(
            dict(zip(traced.inputs[:count], leaves, strict=True)),
            dict(zip(traced.inputs[count:], jax.tree.leaves(inputs), strict=True)),
        )
        return jax.tree.unflatten(traced.result_tree, results)

    return small_apply


def _is_like(new: jax.ShapeDtypeStruct, old: jax.ShapeDtypeStruct, moving: frozenset[int]) -> bool:
    """Whether two values differ along moving axes alone."""
    return (
        len(new.shape) == len(old.shape)
        and new.dtype == old.dtype
        and all(
            axis in moving or sizes[0] == sizes[1] for axis, sizes in enumerate(zip(new.shape, old.shape, strict=True))
        )
    )


def _described(structs: Sequence[jax.ShapeDtypeStruct], moving_axes: Mapping[int, frozenset[int]]) -> str:
    described = []
    for place, struct in enumerate(structs):
        moving = moving_axes.get(place, frozenset())
        sizes = ("batch" if axis in moving else str(size) for axis, size in enumerate(struct.shape))
        described.append(f"{struct.dtype}[{', '.join(sizes)}]")
    return ", ".join(described) or "nothing"


def _fits(
    traced: Program, program: Program, moving_axes: Sequence[frozenset[int]], moving_constants: frozenset[int]
) -> bool:
    """Whether two traces differ in the batch size alone."""
    return (
        traced.signature() == program.signature()
        and all(map(_is_like, traced.shapes, program.shapes, moving_axes))
        and all(
            number in moving_constants or _same(value, program.constants[number])
            for number, value in traced.constants.items()
        )
    )


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if any(jnp.issubdtype(dtype_of(value), jax.dtypes.extended) for value in (first, second)):
        return False
    return np.shape(first) == np.shape(second) and np.array_equal(first, second, equal_nan=False)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _kept(plan: Plan, number: int, leaf: Any) -> tuple[np.ndarray, ...]:
    layout: Sequence[Axis] | None = plan.layouts[number]
    if layout is None:
        return tuple(np.zeros(0, int) for _ in np.shape(leaf))
    return tuple(np.arange(size) if kept is None else kept for kept, size in zip(layout, np.shape(leaf), strict=True))


def _cut(leaf: Any, kept: tuple[np.ndarray, ...]) -> jax.Array:
    if np.shape(leaf) == tuple(len(axis) for axis in kept):
        return jnp.asarray(leaf)
    return jnp.asarray(np.asarray(leaf)[np.ix_(*kept)])


def _difference(before: PyTree, after: PyTree, tolerance: float | None) -> float:
    largest = 0.0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(old.dtype, jnp.inexact) or not old.size:
            continue
        allowed = float(np.sqrt(jnp.finfo(old.dtype).eps)) if tolerance is None else tolerance
        difference = float(jnp.max(jnp.abs(old - new)))
        if not difference <= allowed * float(jnp.max(jnp.abs(old))):
            raise ValueError(
                f"The shrunk network differs from the given one by {difference:.3g} on the example inputs, with outputs of up to "
                f"{float(jnp.max(jnp.abs(old))):.3g}; allowed is {allowed:.3g} of that. Are all params and outputs finite?"
            )
        largest = max(largest, difference)
    return largest


def _reasons(program: Program, analysis: Analysis, plan: Plan, numbers: Sequence[int]) -> list[str | None]:
    """For each array of the params why slices of zeros were kept, None if none were."""
    blame: dict[int, set[str]] = {}
    for index, step in reversed(list(enumerate(program.steps))):
        names = {step.name} if index in analysis.opaque else set()
        for number in step.outputs:
            names |= blame.get(number, set())
        for number in step.inputs:
            blame.setdefault(number, set()).update(names)
    reasons: list[str | None] = []
    for number in numbers:
        fact, layout, reason = analysis.facts[number], plan.layouts[number], None
        if layout is not None and fact.fixed:
            for axis, kept in enumerate(layout):
                used = (fact.value != 0).any(tuple(other for other in range(fact.value.ndim) if other != axis))
                needed = fact.live.any(tuple(other for other in range(fact.live.ndim) if other != axis))
                if fact.value.ndim > 1 and not (used | ~needed if kept is None else (used | ~needed)[kept]).all():
                    readers = ", ".join(sorted(blame.get(number, set())))
                    reason = f"zeros kept: read whole by {readers}" if readers else "zeros kept: other parts need them"
        reasons.append(reason)
    return reasons


def _warn_of_empty_layers(report: ShrinkReport, has_elements: Sequence[bool]) -> None:
    layers: dict[str, list[bool]] = {}
    for leaf, filled in zip(report.leaves, has_elements, strict=True):
        if filled:
            layers.setdefault(leaf.path.rpartition("/")[0] or leaf.path, []).append(0 in leaf.after)
    empty = [module_name(name) for name, gone in layers.items() if all(gone)]
    if empty:
        warnings.warn(
            f"Nothing is left of layer{'s' * (len(empty) > 1)} {', '.join(empty)}: what they computed is constant or is not read.",
            stacklevel=3,
        )
