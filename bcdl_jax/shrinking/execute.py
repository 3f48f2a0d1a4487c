"""Runs the small program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bcdl_jax.graph.program import Atom, Program, Step
from bcdl_jax.shrinking.emitters import EMITTERS, emit_elementwise, emit_whole
from bcdl_jax.shrinking.layouts import Layout
from bcdl_jax.shrinking.loop_emitters import LOOP_EMITTERS
from bcdl_jax.shrinking.machine import Machine
from bcdl_jax.shrinking.plan import Plan


def run_small_program(
    program: Program, plan: Plan, small: Mapping[Atom, tuple[Any, Layout]], wanted: Sequence[Layout | None]
) -> list[Any]:
    """Runs a program on small arrays.

    Args:
      program: The program of the whole network, traced at the batch size of the inputs.
      plan: The plan of the small program.
      small: The arguments with their layouts, by number. Arguments that no result depends on may be missing.
      wanted: The layout of each result; None for a result that is not needed.

    Returns:
      The results; None for those that are not needed.
    """
    machine = Machine(program, plan)
    for number, value in program.constant_values().items():
        machine.put(number, value, machine.whole(number))
    for number, (value, layout) in small.items():
        machine.put(number, value, layout)
    for index, step in enumerate(program.steps):
        if any(machine.is_needed(number) for number in step.outputs):
            _emit(machine, index, step)
    return [
        None if layout is None else machine.get(number, layout)
        for number, layout in zip(program.outputs, wanted, strict=True)
    ]


def _emit(machine: Machine, index: int, step: Step) -> None:
    if index in machine.plan.bodies:
        LOOP_EMITTERS[step.name](machine, index, step, run_small_program)
    elif step.elementwise:
        emit_elementwise(machine, index, step)
    elif step.name == "conv_general_dilated" and step.params["batch_group_count"] != 1:
        emit_whole(machine, index, step)
    else:
        EMITTERS.get(step.name, emit_whole)(machine, index, step)
