"""Follows the arrays of the params through a traced network, also into the bodies of its scans."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from bcdl_jax.graph.loops import split_operands
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.primitives import MOVES
from bcdl_jax.graph.program import Atom, Program, Step, dependent

# The indices of the scans around a step, from the outermost, and the index of the step.
Address = tuple[int, ...]


class CannotFollow(Exception):
    """The reason why an array of the params cannot become variational: a clause such as "it is read by add"."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The network, or the body of a scan in it.

    Attributes:
      program: The steps of the network or of the body.
      moving: The parts of the program that depend on the batch size.
      depends: Numbers of the values that depend on the inputs of the network.
      address: The address of the scan, or () for the network.
    """

    program: Program
    moving: Moving
    depends: frozenset[Atom]
    address: Address = ()

    @functools.cached_property
    def readers(self) -> dict[Atom, list[int]]:
        """The indices of the live steps that read each value."""
        readers: dict[Atom, list[int]] = {}
        for index in sorted(self.program.live_steps):
            for number in dict.fromkeys(self.program.steps[index].inputs):
                readers.setdefault(number, []).append(index)
        return readers

    @functools.cached_property
    def producers(self) -> dict[Atom, int]:
        """The index of the step that computes each value."""
        return {number: index for index, step in enumerate(self.program.steps) for number in step.outputs}

    def address_of(self, index: int) -> Address:
        """The address of a step."""
        return (*self.address, index)

    def only_moves(self, step: Step) -> bool:
        """Whether a step only moves or casts the elements of its operand, one to one."""
        if step.name not in MOVES and step.name != "convert_element_type":
            return False
        before, after = (math.prod(self.program.shapes[number].shape) for number in (step.inputs[0], step.outputs[0]))
        return len(step.inputs) == 1 and before == after

    def body(self, index: int) -> Block | None:
        """The body of a scan, or None if its steps depend on the batch size."""
        return self._bodies[index]

    @functools.cached_property
    def _bodies(self) -> dict[int, Block | None]:
        return {index: self._body(index) for index, step in enumerate(self.program.steps) if step.name == "scan"}

    def _body(self, index: int) -> Block | None:
        step = self.program.steps[index]
        moving = self.moving.bodies.get(index)
        if moving is None:
            return None
        (body,), (_, carried, _) = step.bodies, split_operands(step)
        sources = {inside for inside, number in zip(body.inputs, step.inputs, strict=True) if number in self.depends}
        while True:
            depends = dependent(body, sources)
            passed_on = zip(body.inputs[carried], body.outputs, strict=False)
            more = {number for number, result in passed_on if result in depends} - sources
            if not more:
                return Block(body, moving[0], frozenset(depends), self.address_of(index))
            sources |= more


@dataclasses.dataclass(frozen=True)
class Reading:
    """A step that reads an array of the params, after steps that only move or cast its elements.

    Attributes:
      block: The network or the body in which the step lies.
      index: The index of the step.
      value: The number of the operand that holds the elements of the array.
      shape: The shape of the array.
      chain: The steps that move the array, or a slice of it, to this step.
      moves: The addresses of all steps that move or cast the array.
      slices: The address of the scan that reads one slice of the array in each iteration, or None.
    """

    block: Block
    index: int
    value: Atom
    shape: tuple[int, ...]
    chain: tuple[Step, ...] = ()
    moves: tuple[Address, ...] = ()
    slices: Address | None = None

    @property
    def step(self) -> Step:
        """The step."""
        return self.block.program.steps[self.index]

    @property
    def address(self) -> Address:
        """The address of the step."""
        return self.block.address_of(self.index)


def readings(block: Block, number: Atom) -> list[Reading]:
    """Finds all live steps that read an array of the params.

    Args:
      block: The network.
      number: The number of the array.

    Raises:
      CannotFollow: The network or a scan returns the array, or a scan passes it on.
    """
    return list(_readings(Reading(block, -1, number, block.program.shapes[number].shape)))


def _readings(at: Reading) -> Iterator[Reading]:
    """The readings of a value that is reached with the chain of ``at``."""
    block = at.block
    if at.value in block.program.outputs:
        raise CannotFollow("a scan returns it" if block.address else "the network returns it")
    for index in block.readers.get(at.value, []):
        step, moves = block.program.steps[index], (*at.moves, block.address_of(index))
        if block.only_moves(step):
            yield from _readings(dataclasses.replace(at, value=step.outputs[0], chain=(*at.chain, step), moves=moves))
        elif step.name == "scan":
            yield from _readings_in_scan(at, index)
        else:
            yield dataclasses.replace(at, index=index)


def _readings_in_scan(at: Reading, index: int) -> Iterator[Reading]:
    """The readings of a value in the body of a scan."""
    step, body = at.block.program.steps[index], at.block.body(index)
    where = f" at {step.scope}" if step.scope else ""
    if body is None:
        raise CannotFollow(f"it is read in a scan{where} that runs other steps at other batch sizes")
    constants, carried, _ = split_operands(step)
    for place, (number, inside) in enumerate(zip(step.inputs, body.program.inputs, strict=True)):
        if number != at.value:
            continue
        inner = dataclasses.replace(at, block=body, value=inside)
        if place >= carried.stop:
            if at.slices is not None:
                raise CannotFollow(f"a scan{where} slices it within another scan that slices it")
            if any(moved.name != "convert_element_type" for moved in at.chain):
                raise CannotFollow(f"it is rearranged before a scan{where} slices it")
            inner = dataclasses.replace(inner, chain=(), slices=body.address)
        elif place >= constants.stop:
            raise CannotFollow(f"a scan{where} passes it on")
        yield from _readings(inner)
