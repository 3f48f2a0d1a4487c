"""What in a program is constant, and what is read: two passes over its steps, element by element.

Forwards, an element of a value is *known* if it is the same whatever the inputs: it follows from params and constants alone, as a
channel behind a column of zeros does. Backwards, an element is *live* if a result that is not known depends on it. What is known
or not live need not be computed, and ``specialize`` leaves it out.

The facts are plain numpy arrays of the shapes that the program was traced for, so a rule says for one primitive how elements of the
outputs hang on elements of the inputs. An unknown primitive has the rule that is always safe: everything is read, nothing is known.
Values are taken to be finite: 0 times an unknown number is 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.graph.program import Atom, Program, Step

Flags = np.ndarray  # of bool


@dataclasses.dataclass
class Fact:
    """What is known of one value.

    Attributes:
      unknown: per element, whether it depends on the inputs.
      value: the elements that are known; 0 elsewhere.
      fixed: the whole value follows from params and constants. It is still computed by the small program, so that it can be trained.
      live: per element, whether it must be there in the small program.
    """

    unknown: Flags
    value: np.ndarray
    fixed: bool
    live: Flags

    @property
    def nonzero(self) -> Flags:
        """Per element, whether it may differ from 0."""
        return self.unknown | (self.value != 0)


@dataclasses.dataclass(frozen=True)
class Product:
    """What the backward pass found out about a matrix product or convolution.

    Attributes:
      needed: per contracted axis, which indices contribute to a live result.
      folded: over the contracted axes, which known elements of one operand may be left out, their share being added as a constant.
      folded_side: which operand these elements belong to; None if there are none.
    """

    needed: tuple[Flags, ...]
    folded: Flags | None = None
    folded_side: int | None = None


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Facts by value, what was found about products by step number, and the steps whose primitive has no rule, which block removal."""

    facts: list[Fact]
    products: dict[int, Product]
    opaque: frozenset[int]


def analyze(
    program: Program,
    values: Sequence[Any],
    num_params: int,
    moving_axes: Sequence[frozenset[int]],
    moving_constants: frozenset[Atom],
) -> Analysis:
    """Runs both passes.

    Args:
      program: traced at the shapes of ``params`` and of example inputs.
      values: every value of the program for params and example inputs, see ``Program.evaluate``.
      num_params: how many of the program's first inputs are params.
      moving_axes: per value, the axes whose length follows the batch size; nothing is removed along them.
      moving_constants: literals whose value follows the batch size; nothing is concluded from them.
    """
    facts: list[Fact] = [_not_known(shape.shape) for shape in program.shapes]
    for number in [*program.inputs[:num_params], *program.constants]:
        if _is_plain(program.shapes[number].dtype) and number not in moving_constants:
            facts[number] = _fact(np.zeros(program.shapes[number].shape, bool), values[number], True)
    for step in program.steps:
        fixed = all(facts[number].fixed for number in step.inputs)
        for number, unknown in zip(step.outputs, _forward(step, facts, program, moving_axes), strict=True):
            if unknown is not None:
                facts[number] = _same_for_all_examples(_fact(unknown, values[number], fixed), moving_axes[number])

    for number in program.outputs:
        facts[number].live |= facts[number].unknown | facts[number].fixed
    products: dict[int, Product] = {}
    opaque: set[int] = set()
    for index, step in reversed(list(enumerate(program.steps))):
        if not any(facts[number].live.any() for number in step.outputs):
            continue
        inputs, outputs = [facts[number] for number in step.inputs], [facts[number] for number in step.outputs]
        if step.name in _PRODUCTS and _product_rule(step, program) is not None:
            needs, products[index] = _product_backward(step, program, inputs, outputs[0])
        elif (rule := _rule(step, program)) is not None:
            needs = rule.backward(inputs, [fact.live for fact in outputs])
        else:
            opaque.add(index)
            needs = [np.ones(fact.live.shape, bool) for fact in inputs]
        for fact, need in zip(inputs, needs, strict=True):
            fact.live |= need & (fact.unknown | fact.fixed)
    return Analysis([_compact(fact) for fact in facts], products, frozenset(opaque))


def wholly_unknown(program: Program, num_params: int) -> frozenset[Atom]:
    """Values of which ``analyze`` finds every element unknown, whatever the params: they need not be evaluated for it.

    Not all such values, but those that take most steps: what a network makes of its keys and inputs before it meets params.
    """
    unknown = set(program.inputs[num_params:])
    nonzero = {
        number
        for number, value in program.constants.items()
        if _is_plain(program.shapes[number].dtype) and np.all(np.asarray(value) != 0)
    }
    for step in program.steps:
        known = [number not in unknown for number in step.inputs]
        if known and not any(known):
            found = step.elementwise or step.name in _STRUCTURAL or _has_no_rule(step, program)
        elif all(known):
            if step.name in ("broadcast_in_dim", "reshape") and step.inputs[0] in nonzero:
                nonzero.update(step.outputs)
            continue
        elif step.name == "mul":
            found = nonzero.issuperset(set(step.inputs) - unknown)
        elif step.name == "div":
            found = not known[0] or step.inputs[0] in nonzero
        else:
            found = (step.elementwise and step.name != "select_n") or _has_no_rule(step, program)
        if found:
            unknown.update(step.outputs)
    return frozenset(unknown)


def _has_no_rule(step: Step, program: Program) -> bool:
    return step.name not in _PRODUCTS and _rule(step, program) is None


def _is_plain(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended)


def _not_known(shape: tuple[int, ...]) -> Fact:
    return Fact(np.ones(shape, bool), np.broadcast_to(np.float32(0), shape), False, np.zeros(shape, bool))


def _fact(unknown: Flags, value: Any, fixed: bool) -> Fact:
    return Fact(unknown, np.where(unknown, 0, np.asarray(value)), fixed, np.zeros(unknown.shape, bool))


def _compact(fact: Fact) -> Fact:
    """The same fact; arrays that are the same everywhere take no memory. A small network keeps its facts for as long as it lives."""

    def compact(array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        same = array.size > 1 and (array == array.flat[0]).all()
        return np.broadcast_to(array.flat[0], array.shape) if same else array

    return dataclasses.replace(fact, unknown=compact(fact.unknown), value=compact(fact.value), live=compact(fact.live))


def _forward(
    step: Step, facts: Sequence[Fact], program: Program, moving_axes: Sequence[frozenset[int]]
) -> Sequence[Flags | None]:
    """Per output, which elements are unknown; None for all."""
    inputs = [facts[number] for number in step.inputs]
    shapes = [program.shapes[number].shape for number in step.outputs]
    nothing = [None] * len(shapes)
    if any(not _is_plain(program.shapes[number].dtype) for number in (*step.inputs, *step.outputs)):
        return nothing
    if all(fact.fixed for fact in inputs):
        # What is computed along the batch (its positions, say) has other values at other batch sizes.
        if step.name == "iota":
            moves = step.params["dimension"] in moving_axes[step.outputs[0]]
        else:
            harmless = step.elementwise or step.name in _STRUCTURAL
            moves = not harmless and any(moving_axes[number] for number in (*step.inputs, *step.outputs))
        return nothing if moves else [np.zeros(shape, bool) for shape in shapes]
    if step.name == "concatenate":
        # Params that stand beside what depends on the inputs (a class token) stay params: they are not folded away.
        inputs = [
            dataclasses.replace(fact, unknown=fact.nonzero, value=np.zeros_like(fact.value)) if fact.fixed else fact
            for fact in inputs
        ]
    if (rule := _rule(step, program)) is not None:
        return rule.forward(inputs)
    if step.name in _PRODUCTS and (product := _product_rule(step, program)) is not None:
        x, w = inputs
        return [(product.forward(x.unknown, w.nonzero) + product.forward(x.nonzero, w.unknown)) > 0]
    return nothing


def _same_for_all_examples(fact: Fact, axes: frozenset[int]) -> Fact:
    """Along the batch an element is known only where it is so, and the same, for all examples."""
    if fact.fixed:
        return fact
    unknown = fact.unknown
    for axis in axes:
        differs = fact.value != np.take(fact.value, [0], axis)
        unknown = unknown | (unknown | differs).any(axis, keepdims=True)
    return dataclasses.replace(fact, unknown=unknown, value=np.where(unknown, 0, fact.value))


# Rules of all primitives but products.


@dataclasses.dataclass(frozen=True)
class _Rule:
    """``forward`` takes the facts of the inputs to unknown-flags of the outputs, ``backward`` facts of the inputs and
    live-flags of the outputs to flags of what is read of the inputs."""

    forward: Callable[[Sequence[Fact]], list[Flags]]
    backward: Callable[[Sequence[Fact], Sequence[Flags]], list[Flags]]


def _rule(step: Step, program: Program) -> _Rule | None:
    in_shapes = [program.shapes[number].shape for number in step.inputs]
    out_shapes = [program.shapes[number].shape for number in step.outputs]
    if step.elementwise:
        return _elementwise(step.name, in_shapes, out_shapes)
    if step.name in _STRUCTURAL:
        return _structural(_STRUCTURAL[step.name](step.params, in_shapes), in_shapes)
    if step.name == "iota":
        return _Rule(lambda _: [np.zeros(out_shapes[0], bool)], lambda *_: [])
    if step.name in REDUCTIONS:
        return _reduction(step.params["axes"], in_shapes[0])
    if step.name in WINDOWS:
        return _window(step.params, in_shapes[0])
    if step.name in MIXING:
        axis = step.params[MIXING[step.name]]
        return _mixing(len(in_shapes[0]) + axis if axis < 0 else axis, in_shapes, out_shapes)
    if step.name in ("gather", "dynamic_slice"):
        passing = passing_axes(step, program)
        return _indexing(passing, in_shapes, out_shapes[0]) if passing else None
    return None


def _shrink_to(flags: Flags, shape: tuple[int, ...]) -> Flags:
    """The reverse of broadcasting."""
    if shape == flags.shape:
        return flags
    if not shape:
        return np.asarray(flags.any())
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 != flags.shape[axis])
    return np.asarray(flags.any(axes, keepdims=True))


def _elementwise(name: str, in_shapes: Sequence[tuple[int, ...]], out_shapes: Sequence[tuple[int, ...]]) -> _Rule:
    shape = out_shapes[0]

    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        unknown = [fact.unknown for fact in inputs]
        if name == "mul":
            (first, second) = inputs
            flags = (first.unknown & second.nonzero) | (second.unknown & first.nonzero)
        elif name == "div":
            flags = (unknown[0] | unknown[1]) & inputs[0].nonzero
        elif name == "select_n":
            which, *cases = inputs
            flags = np.zeros(shape, bool)
            for number, case in enumerate(cases):
                flags = flags | (case.unknown & (which.unknown | (which.value.astype(int) == number)))
            same = [~case.unknown & (case.value == cases[0].value) for case in cases]
            flags = flags | (which.unknown & ~np.logical_and.reduce(np.broadcast_arrays(*same)))
        else:
            flags = np.logical_or.reduce(np.broadcast_arrays(*unknown))
        return [np.array(np.broadcast_to(flags, out)) for out in out_shapes]

    def backward(inputs: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        live = np.logical_or.reduce(list(lives))
        needs = [live] * len(inputs)
        if name == "mul":
            needs = [live & inputs[1].nonzero, live & inputs[0].nonzero]
        elif name == "div":
            needs = [live, live & inputs[0].nonzero]
        elif name == "select_n":
            which = inputs[0]
            chosen = [live & (which.unknown | (which.value.astype(int) == case)) for case in range(len(inputs) - 1)]
            needs = [live, *chosen]
        return [_shrink_to(np.broadcast_to(need, shape), size) for need, size in zip(needs, in_shapes, strict=True)]

    return _Rule(forward, backward)


def _structural(sources: list[np.ndarray], in_shapes: Sequence[tuple[int, ...]]) -> _Rule:
    """Outputs that only move elements: ``sources`` gives each one's place in the inputs, laid end to end."""
    sizes = [math.prod(shape) for shape in in_shapes]
    ends = list(itertools.accumulate(sizes))

    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        flat = np.concatenate([fact.unknown.ravel() for fact in inputs])
        return [flat[source] for source in sources]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        flat = np.zeros(sum(sizes), bool)
        for source, live in zip(sources, lives, strict=True):
            flat[source[live]] = True
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), in_shapes, strict=True)]

    return _Rule(forward, backward)


def _places(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Numbers for all elements of some arrays, one after the other."""
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    return [start + np.arange(math.prod(shape)).reshape(shape) for start, shape in zip(starts, shapes, strict=False)]


def _broadcast_source(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    (places,) = _places(shapes[:1])
    sizes = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], shapes[0], strict=True):
        sizes[axis] = size
    return [np.broadcast_to(places.reshape(sizes), params["shape"])]


def _pad_source(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    places, padding = _places(shapes)
    for axis, (low, high, interior) in enumerate(params["padding_config"]):
        size = places.shape[axis]
        spread = np.arange(size) * (interior + 1) + low
        length = low + high + size + max(size - 1, 0) * interior
        inside = (spread >= 0) & (spread < length)
        out = np.full((*places.shape[:axis], length, *places.shape[axis + 1 :]), padding)
        np.moveaxis(out, axis, 0)[spread[inside]] = np.moveaxis(places, axis, 0)[inside]
        places = out
    return [places]


def _slice_source(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    strides = params["strides"] or (1,) * len(shapes[0])
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [_places(shapes)[0][tuple(slice(*cut) for cut in cuts)]]


def _split_source(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    ends = list(itertools.accumulate(params["sizes"]))
    return np.split(_places(shapes)[0], ends[:-1], params["axis"])


_STRUCTURAL: dict[str, Callable[[Mapping[str, Any], Sequence[tuple[int, ...]]], list[np.ndarray]]] = {
    "reshape": lambda params, shapes: [_places(shapes)[0].reshape(params["new_sizes"])],
    "squeeze": lambda params, shapes: [np.squeeze(_places(shapes)[0], params["dimensions"])],
    "expand_dims": lambda params, shapes: [np.expand_dims(_places(shapes)[0], params["dimensions"])],
    "transpose": lambda params, shapes: [np.transpose(_places(shapes)[0], params["permutation"])],
    "broadcast_in_dim": _broadcast_source,
    "slice": _slice_source,
    "rev": lambda params, shapes: [np.flip(_places(shapes)[0], params["dimensions"])],
    "concatenate": lambda params, shapes: [np.concatenate(_places(shapes), params["dimension"])],
    "pad": _pad_source,
    "tile": lambda params, shapes: [np.tile(_places(shapes)[0], params["reps"])],
    "split": _split_source,
}
REDUCTIONS = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "reduce_xor",
    "argmax",
    "argmin",
)
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
# Each output along that axis depends on all inputs along it. By the name of the parameter that holds the axis.
MIXING = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
    "top_k": "axis",
}


def _reduction(axes: Sequence[int], shape: tuple[int, ...]) -> _Rule:
    return _Rule(
        lambda inputs: [np.asarray(inputs[0].unknown.any(tuple(axes)))],
        lambda _, lives: [np.array(np.broadcast_to(np.expand_dims(lives[0], tuple(axes)), shape))],
    )


def _mixing(axis: int, in_shapes: Sequence[tuple[int, ...]], out_shapes: Sequence[tuple[int, ...]]) -> _Rule:
    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        mixed = np.logical_or.reduce([fact.unknown.any(axis, keepdims=True) for fact in inputs])
        return [np.array(np.broadcast_to(mixed, shape)) for shape in out_shapes]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        mixed = np.logical_or.reduce([live.any(axis, keepdims=True) for live in lives])
        return [np.array(np.broadcast_to(mixed, shape)) for shape in in_shapes]

    return _Rule(forward, backward)


def _window(params: Mapping[str, Any], shape: tuple[int, ...]) -> _Rule:
    """Pooling. ``cover[axis][o, i]``: the window of output o covers input i."""
    cover = []
    for size, window, stride, (low, high), base, dilation in zip(
        shape,
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
        strict=True,
    ):
        spread = (size - 1) * base + 1 if size else 0
        count = max(0, (low + spread + high - ((window - 1) * dilation + 1)) // stride + 1)
        place = (np.arange(count)[:, None] * stride + np.arange(window) * dilation - low)[..., None]
        cover.append((place == np.arange(size) * base).any(1))

    def spread_over(flags: Flags, matrices: Sequence[Flags]) -> Flags:
        for axis, matrix in enumerate(matrices):
            if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix), dtype=bool)):
                moved = np.tensordot(matrix.astype(np.float32), flags.astype(np.float32), (1, axis))
                flags = np.moveaxis(moved, 0, axis) > 0
        return flags

    return _Rule(
        lambda inputs: [spread_over(inputs[0].unknown, cover)],
        lambda _, lives: [spread_over(lives[0], [matrix.T for matrix in cover])],
    )


def passing_axes(step: Step, program: Program) -> dict[int, int]:
    """Of a gather or dynamic slice: the axes that are taken whole, output axis by operand axis."""
    operand, output = program.shapes[step.inputs[0]].shape, program.shapes[step.outputs[0]].shape
    sizes = step.params["slice_sizes"]
    if step.name == "dynamic_slice":
        return {axis: axis for axis in range(len(operand)) if sizes[axis] == operand[axis]}
    numbers = step.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [axis for axis in range(len(operand)) if axis not in gone]
    by_axis = dict(zip(kept, numbers.offset_dims, strict=True))
    return {
        axis: out
        for axis, out in by_axis.items()
        if axis not in numbers.start_index_map and sizes[axis] == operand[axis] == output[out]
    }


def _indexing(passing: dict[int, int], in_shapes: Sequence[tuple[int, ...]], out_shape: tuple[int, ...]) -> _Rule:
    """Reads unknown places of the operand, but along the passing axes each element stays in its place."""
    others = tuple(axis for axis in range(len(in_shapes[0])) if axis not in passing)
    out_others = tuple(axis for axis in range(len(out_shape)) if axis not in passing.values())
    order = sorted(passing, key=lambda axis: passing[axis])

    def to_output(flags: Flags) -> Flags:
        rest = [axis for axis in range(len(in_shapes[0])) if axis in passing]
        flags = np.transpose(flags, [rest.index(axis) for axis in order])
        return np.array(np.broadcast_to(np.expand_dims(flags, out_others), out_shape))

    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        operand = inputs[0]
        first = operand.value
        for axis in others:
            first = np.take(first, [0], axis)
        return [to_output((operand.unknown | (operand.value != first)).any(others))]

    def backward(inputs: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        read = lives[0].any(out_others)
        read = np.transpose(read, [order.index(axis) for axis in sorted(passing)])
        operand = np.broadcast_to(np.expand_dims(read, others), in_shapes[0])
        indices = [np.full(shape, bool(lives[0].any())) for shape in in_shapes[1:]]
        return [np.array(operand), *indices]

    return _Rule(forward, backward)


# Products.

_PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class _Bilinear:
    """A product on arrays of counts, its two transposes, and the axes that it sums over, per operand."""

    forward: Callable[[np.ndarray, np.ndarray], np.ndarray]
    to_first: Callable[[np.ndarray, np.ndarray], np.ndarray]
    to_second: Callable[[np.ndarray, np.ndarray], np.ndarray]
    contracted: tuple[Sequence[int], Sequence[int]]
    foldable_sides: tuple[int, ...]


def _product_rule(step: Step, program: Program) -> _Bilinear | None:
    shapes = [program.shapes[number].shape for number in step.inputs]
    if step.name == "dot_general":
        return _dot(step.params["dimension_numbers"], shapes)
    return _convolution(step.params, shapes) if step.params["batch_group_count"] == 1 else None


def _dot(numbers: Any, shapes: Sequence[tuple[int, ...]]) -> _Bilinear:
    (contract_x, contract_w), (batch_x, batch_w) = numbers
    letters = iter(range(len(shapes[0]) + len(shapes[1])))
    x_axes = [next(letters) for _ in shapes[0]]
    w_axes = [-1] * len(shapes[1])
    for x_axis, w_axis in [*zip(contract_x, contract_w, strict=True), *zip(batch_x, batch_w, strict=True)]:
        w_axes[w_axis] = x_axes[x_axis]
    w_axes = [next(letters) if axis < 0 else axis for axis in w_axes]
    out_axes = [x_axes[axis] for axis in batch_x]
    out_axes += [axis for place, axis in enumerate(x_axes) if place not in (*contract_x, *batch_x)]
    out_axes += [axis for place, axis in enumerate(w_axes) if place not in (*contract_w, *batch_w)]

    def einsum(first: np.ndarray, first_axes: list[int], second: np.ndarray, second_axes: list[int], to: list[int]):
        return np.einsum(
            first.astype(np.float32), first_axes, second.astype(np.float32), second_axes, to, optimize=True
        )

    return _Bilinear(
        forward=lambda x, w: einsum(x, x_axes, w, w_axes, out_axes),
        to_first=lambda out, w: einsum(out, out_axes, w, w_axes, x_axes),
        to_second=lambda x, out: einsum(x, x_axes, out, out_axes, w_axes),
        contracted=(contract_x, contract_w),
        foldable_sides=() if batch_x else (0, 1),
    )


def _convolution(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> _Bilinear:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])  # to [n, *spatial, in]
    w_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])  # to [*window, in, out]
    out_order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    x_shape, w_shape = (
        [shape[axis] for axis in order] for shape, order in zip(shapes, (x_order, w_order), strict=True)
    )
    spatial, window = x_shape[1:-1], w_shape[:-2]

    # places[o, k]: the input position that output position o reads through window position k; the last one is padding.
    nowhere, places, out_spatial = math.prod(spatial), np.zeros((1, 1), int), []
    for size, taps, stride, (low, high), spread, dilation in zip(
        spatial,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    ):
        length = low + high + ((size - 1) * spread + 1 if size else 0)
        count = max(0, (length - ((taps - 1) * dilation + 1)) // stride + 1)
        place = np.arange(count)[:, None] * stride + np.arange(taps) * dilation - low
        valid = (place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)
        place = np.where(valid, place // spread, -1)
        mixed = places[:, None, :, None] * size + place[None, :, None, :]
        mixed = np.where((places[:, None, :, None] < 0) | (place[None, :, None, :] < 0), -1, mixed)
        places = mixed.reshape(places.shape[0] * count, places.shape[1] * taps)
        out_spatial.append(count)
    places = np.where(places < 0, nowhere, places)
    n, features_in, features_out = x_shape[0], w_shape[-2], w_shape[-1]
    taps = places.shape[1]

    def patches(x: np.ndarray) -> np.ndarray:  # [groups, n * positions, taps * in]
        flat = np.transpose(x, x_order).astype(np.float32).reshape(n, nowhere, groups * features_in)
        flat = np.concatenate([flat, np.zeros((n, 1, flat.shape[-1]), np.float32)], 1)[:, places]
        flat = flat.reshape(n, places.shape[0], taps, groups, features_in)
        return np.moveaxis(flat, 3, 0).reshape(groups, -1, taps * features_in)

    def kernels(w: np.ndarray) -> np.ndarray:  # [groups, taps * in, out / groups]
        flat = np.transpose(w, w_order).astype(np.float32).reshape(taps * features_in, groups, features_out // groups)
        return np.moveaxis(flat, 1, 0)

    def results(out: np.ndarray) -> np.ndarray:  # [groups, n * positions, out / groups]
        flat = np.transpose(out, out_order).astype(np.float32).reshape(-1, groups, features_out // groups)
        return np.moveaxis(flat, 1, 0)

    def forward(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        out = np.moveaxis(patches(x) @ kernels(w), 0, 1).reshape(n, *out_spatial, features_out)
        return np.transpose(out, np.argsort(out_order))

    def to_first(out: np.ndarray, w: np.ndarray) -> np.ndarray:
        flat = results(out) @ np.swapaxes(kernels(w), 1, 2)
        flat = np.moveaxis(flat.reshape(groups, n, places.shape[0], taps, features_in), 0, 3)
        x = np.zeros((n, nowhere + 1, groups, features_in), np.float32)
        for tap in range(taps):  # for one tap no position is read twice, but the padding
            x[:, places[:, tap]] += flat[:, :, tap]
        return np.transpose(x[:, :-1].reshape(x_shape), np.argsort(x_order))

    def to_second(x: np.ndarray, out: np.ndarray) -> np.ndarray:
        flat = np.swapaxes(patches(x), 1, 2) @ results(out)
        return np.transpose(np.moveaxis(flat, 0, 1).reshape(w_shape), np.argsort(w_order))

    padded = any(low or high for low, high in params["padding"]) or any(spread > 1 for spread in params["lhs_dilation"])
    return _Bilinear(
        forward=forward,
        to_first=to_first,
        to_second=to_second,
        contracted=((numbers.lhs_spec[1],), (numbers.rhs_spec[1],)),
        foldable_sides=() if padded else (0,),
    )


def _product_backward(
    step: Step, program: Program, inputs: Sequence[Fact], output: Fact
) -> tuple[list[Flags], Product]:
    product = _product_rule(step, program)
    assert product is not None
    counts = [inputs[0].nonzero, inputs[1].nonzero]
    folded, folded_side = None, None
    if not output.fixed:
        for side in product.foldable_sides:
            if not inputs[side].fixed and inputs[1 - side].fixed:
                folded, folded_side = _constant_slices(inputs[side], product.contracted[side]), side
                others = tuple(axis for axis in range(counts[side].ndim) if axis not in product.contracted[side])
                order = np.argsort(product.contracted[side])
                counts[side] = counts[side] & ~np.expand_dims(np.transpose(folded, order), others)
                if not folded.any():
                    folded, folded_side = None, None
                break
    needs = [
        (product.to_first(output.live, counts[1]) > 0) & counts[0],
        (product.to_second(counts[0], output.live) > 0) & counts[1],
    ]
    needed = []
    for axis in product.contracted[0]:
        needed.append(needs[0].any(tuple(other for other in range(needs[0].ndim) if other != axis)))
    return needs, Product(tuple(needed), folded, folded_side)


def _constant_slices(fact: Fact, contracted: Sequence[int]) -> Flags:
    """Over the contracted axes, in their order: which elements are known, the same along all other axes, and not 0."""
    others = tuple(axis for axis in range(fact.unknown.ndim) if axis not in contracted)
    first = fact.value
    for axis in others:
        first = np.take(first, [0], axis)
    flags = ~(fact.unknown | (fact.value != first)).any(others) & (first != 0).any(others)
    return np.transpose(flags, np.argsort(np.argsort(contracted)))
