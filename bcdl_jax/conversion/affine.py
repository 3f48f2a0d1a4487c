"""Biases and batch norms: the steps behind a product that shift and scale each of its outputs by arrays of the params alone.

They are folded into the kernel and the bias of the posterior. The given network then gets a kernel that includes the scale, and arrays with
which the steps add the bias and do nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.conversion.layouts import ProductLayout, moved
from bcdl_jax.conversion.readings import Address, Block, Reading
from bcdl_jax.graph.program import Atom, Step, is_expression

# The only reading of each array of the params, by the address of its block and the number of the value that is read.
Sources = Mapping[tuple[Address, Atom], tuple[int, Reading]]

_SIGNS = {"add": 1, "add_any": 1, "sub": -1}


class _NotAligned(Exception):
    """A value does not have one element for each output of the product, in their order."""


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A value that depends on the params alone and has one element for each output of a product.

    Attributes:
      value: The number of the value.
      order: The places, in the flattened value, of the elements for the outputs.
      leaves: The readings of the arrays from which it is computed, by the numbers of the arrays.
      steps: The indices of the steps that compute it.
    """

    value: Atom
    order: np.ndarray
    leaves: dict[int, Reading]
    steps: tuple[int, ...]

    def evaluate(self, block: Block, arrays: Mapping[int, Any]) -> jax.Array:
        """The elements for the outputs, [out]. ``arrays`` holds the arrays, or their slices for one layer, by number."""
        program = block.program
        # In float32 at least: the network may round the operand to half precision, but the posterior should not.
        dtype = jnp.result_type(jnp.float32, *(arrays[place].dtype for place in self.leaves))
        values: dict[Atom, Any] = {}
        for place, reading in self.leaves.items():
            values[reading.value] = moved(arrays[place].astype(dtype), reading.chain)
        for index in self.steps:
            step = program.steps[index]
            operands = [values[n] if n in values else jnp.asarray(program.constants[n], dtype) for n in step.inputs]
            results = operands if step.name == "convert_element_type" else step.bind(*operands)
            values |= dict(zip(step.outputs, results, strict=True))
        return jnp.reshape(values[self.value], -1)[self.order]


@dataclasses.dataclass(frozen=True)
class _AffineStep:
    """One of the steps, with a sign of 1 or -1 if it adds, or 0 if it multiplies."""

    operand: _Operand
    sign: int


@dataclasses.dataclass(frozen=True)
class Affine:
    """The steps behind a product that shift and scale its outputs.

    Attributes:
      block: The network or the body that holds them.
      parts: The steps in their order. At most one of them multiplies.
      outputs: The number of the operand that holds the outputs, by the address of each step.
      unused: The addresses of the steps that compute the other operands.
      shapes: The shapes of the arrays, or of their slices for one layer, by number.
      gain: The number of the array that scales the outputs in proportion, or None if no step multiplies.
    """

    block: Block
    parts: tuple[_AffineStep, ...]
    outputs: dict[Address, Atom]
    unused: frozenset[Address]
    shapes: dict[int, tuple[int, ...]]
    gain: int | None

    @property
    def fixed(self) -> frozenset[int]:
        """The numbers of the arrays that keep their values, such as the running variance of a batch norm."""
        return frozenset(self.shapes) - {self.gain, *self.shifts}

    @property
    def bias(self) -> int | None:
        """The number of the array that ``unfolded`` makes the bias, or None if no step adds. It makes all other ``shifts`` 0."""
        return next(reversed(self.shifts), None)

    def can_unfold(self, arrays: Mapping[int, Any]) -> jax.Array:
        """Whether the gain can make the scale 1, for these arrays by number: no other factor of the scale is 0 or not finite."""
        if self.gain is None:
            return jnp.array(True)
        one = {**arrays, self.gain: jnp.ones(self.shapes[self.gain])}
        factors = [part.operand.evaluate(self.block, one) for part in self.parts if not part.sign]
        return jnp.all(jnp.stack([jnp.isfinite(1 / factor) & jnp.isfinite(factor) for factor in factors]))

    def folded(self, kernel: jax.Array, arrays: Mapping[int, Any]) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias that do the work of the product and of these steps.

        Args:
          kernel: The kernel of the product, [..., out].
          arrays: The arrays by number.
        """
        gain: jax.Array | float = 1.0
        bias: jax.Array | float = 0.0
        for part in self.parts:
            vector = part.operand.evaluate(self.block, arrays)
            if part.sign:
                bias = bias + part.sign * vector
            else:
                gain, bias = vector, bias * vector
        has_bias = self.bias is not None
        return (kernel * gain).astype(kernel.dtype), jnp.asarray(bias, kernel.dtype) if has_bias else None

    def unfolded(self, bias: jax.Array | None, fixed: Mapping[int, Any]) -> dict[int, jax.Array]:
        """Arrays with which the steps add a bias, and do nothing else.

        Args:
          bias: The bias, [out], or None.
          fixed: The arrays of ``self.fixed`` by number.
        """
        arrays = dict(fixed)
        for part in self.parts:
            if not part.sign:
                assert self.gain is not None
                one = arrays | {self.gain: jnp.ones(self.shapes[self.gain])}
                arrays[self.gain] = (1 / part.operand.evaluate(self.block, one)).reshape(self.shapes[self.gain])
        for place, sign in self.shifts.items():
            value = jnp.zeros(math.prod(self.shapes[place])) if bias is None or place != self.bias else sign * bias
            arrays[place] = value.reshape(self.shapes[place])
        return arrays

    @property
    def shifts(self) -> dict[int, int]:
        """The sign of each array that is added, by number."""
        return {place: part.sign for part in self.parts if part.sign for place in part.operand.leaves}


def find_affine(
    block: Block, index: int, layout: ProductLayout, slices: Address | None, sources: Sources
) -> Affine | None:
    """Finds the steps behind a product that can be folded into it, or None if there are none.

    Args:
      block: The network or the body that holds the product.
      index: The index of the product.
      layout: The layout of the product.
      slices: The address of the scan that slices its kernel, or None.
      sources: The only readings of the arrays of the params.
    """
    (outputs,) = block.program.steps[index].outputs
    count, numbers = layout.canonical.shape[-1], layout.output_numbers(block.program.shapes[outputs].shape)
    parts, passed = list[_AffineStep](), dict[Address, Atom]()
    while len(block.readers.get(outputs, ())) == 1 and outputs not in block.program.outputs:
        (reader,) = block.readers[outputs]
        step = block.program.steps[reader]
        if block.only_moves(step):
            numbers = moved(numbers, [step])
        else:
            part = _affine_step(block, step, outputs, numbers, count, slices, sources)
            if part is None or (not part.sign and any(not other.sign for other in parts)):
                break
            parts.append(part)
            passed[block.address_of(reader)] = outputs
        outputs = step.outputs[0]
    leaves = {place: reading for part in parts for place, reading in part.operand.leaves.items()}
    if not parts:
        return None
    unused = {address for reading in leaves.values() for address in reading.moves}
    unused |= {block.address_of(each) for part in parts for each in part.operand.steps}
    gain = next((_gain(block, part.operand) for part in parts if not part.sign), None)
    return Affine(block, tuple(parts), passed, frozenset(unused), {p: _shape(r) for p, r in leaves.items()}, gain)


def _affine_step(
    block: Block,
    step: Step,
    outputs: Atom,
    numbers: np.ndarray,
    count: int,
    slices: Address | None,
    sources: Sources,
) -> _AffineStep | None:
    """A step that shifts or scales the outputs, or None if it does something else.

    Args:
      block: The network or the body.
      step: The step.
      outputs: The number of its operand that holds the outputs.
      numbers: The output to which each element of this operand belongs.
      count: The number of outputs.
      slices: The address of the scan that slices the kernel, or None.
      sources: The only readings of the arrays of the params.
    """
    sides = [side for side, number in enumerate(step.inputs) if number == outputs]
    if step.name not in (*_SIGNS, "mul") or len(sides) != 1 or (step.name == "sub" and sides != [0]):
        return None
    value, leaves, steps = step.inputs[1 - sides[0]], dict[int, Reading](), list[int]()
    try:
        found = _output_numbers(block, value, count, slices, sources, leaves, steps)
    except _NotAligned:
        return None
    if found is None or not np.array_equal(np.broadcast_to(found, numbers.shape), numbers):
        return None
    operand = _Operand(value, np.unique(found, return_index=True)[1], leaves, tuple(sorted(steps)))
    if step.name == "mul":
        return None if _gain(block, operand) is None else _AffineStep(operand, 0)
    only_moved = len(leaves) == 1 and all(block.only_moves(block.program.steps[each]) for each in steps)
    return _AffineStep(operand, _SIGNS[step.name]) if only_moved else None


def _output_numbers(
    block: Block,
    value: Atom,
    count: int,
    slices: Address | None,
    sources: Sources,
    leaves: dict[int, Reading],
    steps: list[int],
) -> np.ndarray | None:
    """The output to which each element of a value belongs, or None for a scalar constant.

    Args:
      block: The network or the body.
      value: The number of the value.
      count: The number of outputs.
      slices: The address of the scan that slices the kernel, or None.
      sources: The only readings of the arrays of the params.
      leaves: The arrays that are found. This function adds to them.
      steps: The steps that are found. This function adds to them.
    """
    program = block.program
    if (block.address, value) in sources:
        place, reading = sources[block.address, value]
        if reading.slices != slices or math.prod(_shape(reading)) != count or place in leaves:
            raise _NotAligned
        leaves[place] = reading
        return moved(np.arange(count).reshape(_shape(reading)), reading.chain)
    if value in program.constants:
        constant = program.constants[value]
        if is_expression(constant) or np.size(constant) != 1:
            raise _NotAligned
        return None
    if value in block.depends or value not in block.producers or value in program.outputs:
        raise _NotAligned
    index = block.producers[value]
    step = program.steps[index]
    if len(block.readers[value]) != 1 or not (
        step.elementwise or block.only_moves(step) or step.name == "broadcast_in_dim"
    ):
        raise _NotAligned
    steps.append(index)
    each = [_output_numbers(block, number, count, slices, sources, leaves, steps) for number in step.inputs]
    known = [numbers for numbers in each if numbers is not None]
    if not known:
        return None
    if not step.elementwise:
        return moved(known[0], [step])
    shape = program.shapes[value].shape
    whole = [np.broadcast_to(numbers, shape) for numbers in known]
    if not all(np.array_equal(numbers, whole[0]) for numbers in whole):
        raise _NotAligned
    return whole[0]


def _gain(block: Block, operand: _Operand) -> int | None:
    """The number of an array to which an operand is proportional: it passes only moves and products on its way."""
    producers = {
        number: block.program.steps[index] for index in operand.steps for number in block.program.steps[index].outputs
    }

    def proportional(value: Atom) -> int | None:
        found = next((place for place, reading in operand.leaves.items() if reading.value == value), None)
        if found is not None or value not in producers:
            return found
        step = producers[value]
        if step.name != "mul" and not block.only_moves(step) and step.name != "broadcast_in_dim":
            return None
        return next((place for place in map(proportional, step.inputs) if place is not None), None)

    return proportional(operand.value)


def _shape(reading: Reading) -> tuple[int, ...]:
    """The shape of an array of the params, or of its slice for one layer."""
    return reading.shape if reading.slices is None else reading.shape[1:]
