"""Runs the small program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bcdl_jax.graph.facts import Fact
from bcdl_jax.graph.program import Atom, Program, Step
from bcdl_jax.shrinking.emitters import EMITTERS, emit_elementwise, emit_whole
from bcdl_jax.shrinking.machine import Machine
from bcdl_jax.shrinking.plan import Plan


def run_small_program(
    program: Program,
    plan: Plan,
    facts: Sequence[Fact],
    moving_axes: Sequence[frozenset[int]],
    small_params: Mapping[Atom, Any],
    inputs: Mapping[Atom, Any],
) -> list[Any]:
    """Runs a program on small params and whole inputs.

    Args:
      program: The program of the whole network, traced at the batch size of the inputs.
      plan: The plan of the small program.
      facts: The facts about each value.
      moving_axes: The axes of each value whose size depends on the batch size.
      small_params: The params by number, in the layouts of the plan.
      inputs: The inputs by number.

    Returns:
      The flattened results, whole.
    """
    machine = Machine(program, plan, facts, moving_axes)
    for number, value in {**inputs, **program.constants}.items():
        machine.put(number, value, machine.whole(number))
    for number, value in small_params.items():
        machine.put(number, value, machine.layout(number))
    for index, step in enumerate(program.steps):
        if any(machine.is_needed(number) for number in step.outputs):
            _emitter(step)(machine, index, step)
    return [machine.get(number, machine.whole(number)) for number in program.outputs]


def _emitter(step: Step) -> Callable[[Machine, int, Step], None]:
    if step.elementwise:
        return emit_elementwise
    if step.name == "conv_general_dilated" and step.params["batch_group_count"] != 1:
        return emit_whole
    return EMITTERS.get(step.name, emit_whole)
