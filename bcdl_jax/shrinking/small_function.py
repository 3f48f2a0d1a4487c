"""The function of a shrunk network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.batch_size import TracedNetwork, is_like
from bcdl_jax.graph.program import Program, dtype_of
from bcdl_jax.graph.tracing import trace
from bcdl_jax.shrinking.execute import run_small_program
from bcdl_jax.shrinking.layouts import Layout, kept_indices
from bcdl_jax.shrinking.plan import Plan


def small_function(
    apply: Callable[..., PyTree],
    params: PyTree,
    network: TracedNetwork,
    plan: Plan,
    paths: Sequence[str],
) -> Callable[..., PyTree]:
    """The function of the shrunk network, ``small_apply(small_params, *inputs)``.

    Args:
      apply: The whole network, ``apply(params, *inputs)``.
      params: The params of the whole network.
      network: The trace of the whole network.
      plan: The plan of the small program.
      paths: The names of the params, for errors.
    """
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)), params)
    structure: Any = jax.tree.structure(params)
    count = structure.num_leaves
    shapes = [
        tuple(map(len, kept_indices(plan.layouts[number], leaf.shape)))
        for number, leaf in zip(network.program.inputs, jax.tree.leaves(whole), strict=False)
    ]
    traces = _Traces(apply, whole, network, {})

    def small_apply(small_params: PyTree, *inputs: PyTree) -> PyTree:
        leaves = structure.flatten_up_to(small_params)
        for path, leaf, shape in zip(paths, leaves, shapes, strict=True):
            if np.shape(leaf) != shape:
                raise ValueError(f"small_params has {path} of shape {np.shape(leaf)}; it must be {shape}.")
        program = traces.at_shapes_of(inputs)

        def whole_layout(number: int) -> Layout:
            return (None,) * len(program.shapes[number].shape)

        small = {}
        for number, leaf in zip(program.inputs, [*leaves, *jax.tree.leaves(inputs)], strict=True):
            small[number] = (leaf, whole_layout(number))
        for number in program.inputs[:count]:
            small[number] = (small[number][0], plan.layouts[number] or whole_layout(number))
        results = run_small_program(program, plan, small, [whole_layout(number) for number in program.outputs])
        return jax.tree.unflatten(program.result_tree, results)

    return small_apply


@dataclasses.dataclass(frozen=True)
class _Traces:
    """Traces of the whole network at all shapes of inputs so far.

    Attributes:
      apply: The whole network, ``apply(params, *inputs)``.
      params: Shapes and dtypes of the params of the whole network.
      network: The trace at the time of shrinking.
      programs: The traces, by tree structure, shapes and dtypes of the inputs.
    """

    apply: Callable[..., PyTree]
    params: PyTree
    network: TracedNetwork
    programs: dict[Any, Program]

    def at_shapes_of(self, inputs: tuple[PyTree, ...]) -> Program:
        """The trace at the shapes of some inputs.

        Raises:
          ValueError: The inputs differ from the example inputs in more than the batch size, or the network runs other operations at this
            batch size.
        """
        leaves, tree = jax.tree.flatten(inputs)
        structs = [jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for leaf in leaves]
        key = (tree, tuple((struct.shape, struct.dtype) for struct in structs))
        if key not in self.programs:
            like_examples = self._are_like_examples(structs)
            traced = trace(self.apply, self.params, *jax.tree.unflatten(tree, structs)) if like_examples else None
            program = None if traced is None else self.network.program_at(traced)
            if program is None:
                raise ValueError(self._refusal(structs, like_examples))
            self.programs[key] = program
        return self.programs[key]

    def _examples(self) -> list[tuple[jax.ShapeDtypeStruct, frozenset[int]]]:
        """Shapes and batch-dependent axes of the example inputs."""
        program, axes = self.network.program, self.network.moving.axes
        count = len(jax.tree.leaves(self.params))
        return [(program.shapes[number], axes[number]) for number in program.inputs[count:]]

    def _are_like_examples(self, structs: Sequence[jax.ShapeDtypeStruct]) -> bool:
        examples = self._examples()
        return len(structs) == len(examples) and all(
            is_like(struct, example, moving) for struct, (example, moving) in zip(structs, examples, strict=True)
        )

    def _refusal(self, structs: Sequence[jax.ShapeDtypeStruct], like_examples: bool) -> str:
        given = _described([(struct, frozenset()) for struct in structs])
        message = f"The inputs are {given}; this small function takes {_described(self._examples())}."
        if not like_examples:
            return message
        symbolic = any(not isinstance(size, int) for struct in structs for size in struct.shape)
        at = "At some other batch size" if symbolic else "At this batch size"
        return f"{message} {at} the model runs other operations than at that of the example inputs; shrink it with inputs of this batch size."


def _described(arrays: Sequence[tuple[jax.ShapeDtypeStruct, frozenset[int]]]) -> str:
    """Dtypes and shapes of arrays, with "batch" in place of the sizes of their batch-dependent axes."""
    described = []
    for struct, moving in arrays:
        sizes = ("batch" if axis in moving else str(size) for axis, size in enumerate(struct.shape))
        described.append(f"{struct.dtype}[{', '.join(sizes)}]")
    return ", ".join(described) or "nothing"
