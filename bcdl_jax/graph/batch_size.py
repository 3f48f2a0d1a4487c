"""Traces a network so that the trace holds for any batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.example_inputs import check_arguments, resized
from bcdl_jax.graph.matching import match_constants, same_constant
from bcdl_jax.graph.moving import Moving, differences
from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.program import Atom, Program, compile_quickly, dtype_of
from bcdl_jax.graph.tracing import extend, trace

# The batch sizes of the two traces of a network.
_SIZES = (2, 3)


@dataclasses.dataclass(frozen=True)
class TracedNetwork:
    """A network, traced at one batch size.

    Attributes:
      program: The program.
      moving: The parts of the program that depend on the batch size.
      larger: The program at a larger batch size, or None if the network is traced for one batch size alone.
      checked: True if the outputs for a batch of one agreed with those of the network, although the two traces differ.
      limit: The batch sizes for which the trace does not hold, with the reason, or None. It is the end of a sentence about a function that
        is made of the trace, such as "does not take a batch of one: there, the network runs other operations."
    """

    program: Program
    moving: Moving
    larger: Program | None = None
    checked: bool = False
    limit: str | None = None

    def program_at(self, traced: Program) -> Program | None:
        """The program at the batch size of another trace of the network, or None if that trace differs in more than the batch size."""
        if self._fits(traced):
            return traced
        # The trace lacks steps that change nothing at its size. The program of the plan keeps them.
        program = self.extended(self._batch_size(traced))
        matched = None if program is None else match_constants(program, traced)
        if program is None or matched is None:
            return program if self.checked and self._batch_size(traced) == 1 else None
        if not self._same_constants({number: traced.constants[matched[number]] for number in matched}):
            return None
        moving = {number: traced.constants[matched[number]] for number in self.moving.constants if number in matched}
        return dataclasses.replace(program, constants=program.constants | moving)

    def extended(self, size: int | None) -> Program | None:
        """The program at another batch size, without a trace of that size; None if that is not possible."""
        if self.larger is None or size is None:
            return None
        try:
            program = extend([self.program, self.larger], _SIZES, size, self.moving.constants)
        except ValueError:
            return None
        constants = {number: self._constant_at(size, number) for number in self.moving.constants}
        return dataclasses.replace(program, constants=program.constants | constants)

    def _constant_at(self, size: int, number: Atom) -> Any:
        """A constant that depends on the batch size, such as the divisor of a mean, if it is linear in that size."""
        assert self.larger is not None
        two, three = (program.constants[number] for program in (self.program, self.larger))
        if np.shape(two) or not is_plain(dtype_of(two)) or not jnp.issubdtype(dtype_of(two), np.number):
            return two
        return np.asarray(two + (three - two) * (size - _SIZES[0]), dtype_of(two))

    def _fits(self, traced: Program) -> bool:
        """Whether another trace has the same steps."""
        return (
            _same_steps(traced, self.program, self.moving)
            and _are_like(traced, self.program, self.moving)
            and self._same_constants(traced.constants)
        )

    def _same_constants(self, constants: Mapping[Atom, Any]) -> bool:
        own = self.program.constants
        return all(
            number in self.moving.constants or same_constant(value, own[number]) for number, value in constants.items()
        )

    def _batch_size(self, traced: Program) -> int | None:
        """The batch size of a trace; None if it is symbolic or there is none."""
        for number, other in zip(self.program.inputs, traced.inputs, strict=True):
            for axis in self.moving.axes[number]:
                size = traced.shapes[other].shape[axis]
                return size if isinstance(size, int) else None
        return None


def trace_for_any_batch(apply: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]) -> TracedNetwork:
    """Traces a network with two examples, or with all given examples if the network depends on the batch size.

    Args:
      apply: The network, ``apply(params, *inputs)``.
      params: The params of the network.
      inputs: Example inputs. The leading axis of the first array that has one is the batch.

    Returns:
      The traced network.

    Raises:
      ValueError: ``apply`` takes another number of inputs.
    """
    check_arguments(apply, inputs)
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs) if np.ndim(leaf)]
    given = trace(apply, params, *inputs)
    limit = None
    if sizes and sizes[0]:
        try:
            two, three = (trace(apply, params, *resized(inputs, sizes[0], size)) for size in _SIZES)
        except Exception:  # The network rejects another batch size, with an error of any type.
            pass
        else:
            if two.signature() == three.signature():
                network = _checked_for_one(
                    TracedNetwork(two, differences(two, three), three), apply, params, resized(inputs, sizes[0], 1)
                )
                if network.program_at(given) is not None:
                    return network
            limit = f"takes batches of {sizes[0]} alone: at other batch sizes, the network runs other operations."
    return TracedNetwork(given, differences(given, given), limit=limit)


def _checked_for_one(
    network: TracedNetwork, apply: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]
) -> TracedNetwork:
    """The network with the result of a check for a batch of one, the size at which JAX traces other steps most often.

    Args:
      network: The traced network.
      apply: The network, ``apply(params, *inputs)``.
      params: The params of the network.
      inputs: One example.
    """
    try:
        one = trace(apply, params, *inputs)
    except Exception:  # The network rejects a batch of one, with an error of any type.
        return network
    if network.program_at(one) is not None:
        return network
    program = network.extended(1)
    if program is not None and _compute_the_same(one, program, (params, inputs)):
        return dataclasses.replace(network, checked=True)
    return dataclasses.replace(network, limit="does not take a batch of one: there, the network runs other operations.")


def _compute_the_same(first: Program, second: Program, arguments: PyTree) -> bool:
    """Whether two programs have the same results for some arguments, up to rounding."""
    leaves = jax.tree.leaves(arguments)
    shapes = [[program.shapes[number] for number in program.outputs] for program in (first, second)]
    if shapes[0] != shapes[1] or first.result_tree != second.result_tree:
        return False

    def differences(leaves: list[Any]) -> list[tuple[jax.Array, jax.Array]]:
        results = (jax.tree.leaves(program.run(leaves, {})) for program in (first, second))
        return [
            (jnp.max(jnp.abs(one - other)), jnp.max(jnp.abs(one)))
            for one, other in zip(*results, strict=True)
            if one.size
        ]

    def is_small(difference: Any, largest: Any) -> bool:
        inexact = jnp.issubdtype(largest.dtype, jnp.inexact)
        return bool(difference <= (float(np.sqrt(jnp.finfo(largest.dtype).eps)) * largest if inexact else 0))

    return all(is_small(*each) for each in compile_quickly(differences, leaves)(leaves))


def _same_steps(new: Program, old: Program, moving: Moving) -> bool:
    """Whether two programs have the same steps, also within loops and branches that ``moving`` lists."""
    if new.signature() != old.signature():
        return False
    return all(
        _same_steps(one, other, inner)
        for index, bodies in moving.bodies.items()
        for one, other, inner in zip(new.steps[index].bodies, old.steps[index].bodies, bodies, strict=True)
    )


def _are_like(new: Program, old: Program, moving: Moving) -> bool:
    """Whether two programs with the same signature have values of the same shapes, apart from the batch-dependent axes, and the same inner constants."""
    if not all(map(is_like, new.shapes, old.shapes, moving.axes)):
        return False
    for index, bodies in moving.bodies.items():
        for one, other, inner in zip(new.steps[index].bodies, old.steps[index].bodies, bodies, strict=True):
            constants_differ = any(
                not same_constant(value, other.constants[number]) for number, value in one.constants.items()
            )
            if constants_differ or not _are_like(one, other, inner):
                return False
    return True


def is_like(new: jax.ShapeDtypeStruct, old: jax.ShapeDtypeStruct, moving: frozenset[int]) -> bool:
    """Whether two values have the same shape, apart from the batch-dependent axes, and the same dtype."""
    return (
        len(new.shape) == len(old.shape)
        and new.dtype == old.dtype
        and all(
            axis in moving or sizes[0] == sizes[1] for axis, sizes in enumerate(zip(new.shape, old.shape, strict=True))
        )
    )
