"""Emitters of loops and branches.

A body runs on small arrays, like the whole program. Values that an iteration passes on to the next have one layout in all iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from bcdl_jax.graph.loops import split_operands
from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.program import Atom, Program, Step
from bcdl_jax.shrinking.layouts import Layout, union
from bcdl_jax.shrinking.machine import Machine
from bcdl_jax.shrinking.plan import Plan

# ``run_small_program``, which runs the emitters of a body.
Run = Callable[[Program, Plan, Mapping[Atom, tuple[Any, Layout]], Sequence[Layout | None]], list[Any]]
Operand = tuple[Atom, Any, Layout]  # The number of a value in a body, its small array and its layout.


def emit_scan(machine: Machine, index: int, step: Step, run: Run) -> None:
    """Emits a scan whose body was analysed."""
    body, plan = step.bodies[0], machine.plan.bodies[index][0]
    constants, carried, stacks = split_operands(step)
    count = carried.stop - carried.start
    fixed = _operands(machine, step.inputs[constants], body.inputs[constants], plan)
    first = _operands(machine, step.inputs[carried], body.inputs[carried], plan)
    slices = _operands(machine, step.inputs[stacks], body.inputs[stacks], plan, leading_axes=1)
    kept = [plan.layouts[number] for number in body.inputs[carried]]
    outputs = step.outputs[count:]
    layouts = [machine.layout(number) if machine.is_needed(number) else None for number in outputs]
    wanted = [*kept, *(None if layout is None else layout[1:] for layout in layouts)]

    def iteration(carry: list[Any], values: list[Any]) -> tuple[list[Any], list[Any]]:
        results = run(body, plan, _by_number(fixed, _with(first, carry), _with(slices, values)), wanted)
        return _carry(body, results[:count]), [value for value in results[count:] if value is not None]

    carry, stacked = lax.scan(
        iteration,
        _carry(body, _expanded(first, body.inputs[carried])),
        [value for _, value, _ in slices],
        # The length may be symbolic. ``scan`` does not accept a symbolic length, but infers it from the stacks.
        length=None if slices else step.params["length"],
        **{name: step.params[name] for name in ("reverse", "unroll")},
    )
    _put_carry(machine, step.outputs[:count], kept, carry)
    rest = iter(stacked)
    for number, layout in zip(outputs, layouts, strict=True):
        if layout is not None:
            machine.put(number, next(rest), (None, *layout[1:]))


def emit_while(machine: Machine, index: int, step: Step, run: Run) -> None:
    """Emits a while whose condition and body were analysed."""
    (condition, body), (condition_plan, plan) = step.bodies, machine.plan.bodies[index]
    constants, carried, _ = split_operands(step)
    own = slice(0, constants.start)
    start, count = constants.stop - constants.start, carried.stop - carried.start
    inputs = body.inputs[start:]
    for_condition = _operands(machine, step.inputs[own], condition.inputs[own], condition_plan)
    for_body = _operands(machine, step.inputs[constants], body.inputs[:start], plan)
    first = _operands(machine, step.inputs[carried], inputs, plan)
    kept = [plan.layouts[number] for number in inputs]
    in_condition = dict(zip(inputs, condition.inputs[own.stop :], strict=True))

    def goes_on(carry: list[Any]) -> Any:
        renamed = [(in_condition[number], value, layout) for number, value, layout in _with(first, carry)]
        return run(condition, condition_plan, _by_number(for_condition, renamed), [()])[0]

    def iteration(carry: list[Any]) -> list[Any]:
        return _carry(body, run(body, plan, _by_number(for_body, _with(first, carry)), kept))

    carry = lax.while_loop(goes_on, iteration, _carry(body, _expanded(first, inputs)))
    _put_carry(machine, step.outputs[:count], kept, carry)


def emit_cond(machine: Machine, index: int, step: Step, run: Run) -> None:
    """Emits a branch whose bodies were analysed."""
    plans = machine.plan.bodies[index]
    operands: list[tuple[int, Any, Layout]] = []  # The place of each needed operand, its small array and its layout.
    for place, number in enumerate(step.inputs[1:]):
        needed = [plan.layouts[body.inputs[place]] for body, plan in zip(step.bodies, plans, strict=True)]
        layouts = [layout for layout in needed if layout is not None]
        if layouts:
            shared = tuple(union(axes) for axes in zip(*layouts, strict=True))
            operands.append((place, machine.get(number, shared), shared))
    wanted = [machine.layout(number) if machine.is_needed(number) else None for number in step.outputs]

    def branch(body: Program, plan: Plan) -> Callable[[list[Any]], list[Any]]:
        def run_branch(values: list[Any]) -> list[Any]:
            renamed = [
                (body.inputs[place], value, layout) for (place, _, layout), value in zip(operands, values, strict=True)
            ]
            results = run(body, plan, _by_number(renamed), wanted)
            return [
                _strong(value, body, number)
                for number, value in zip(body.outputs, results, strict=True)
                if value is not None
            ]

        return run_branch

    branches = [branch(body, plan) for body, plan in zip(step.bodies, plans, strict=True)]
    results = iter(lax.switch(machine.get(step.inputs[0], ()), branches, [value for _, value, _ in operands]))
    for number, layout in zip(step.outputs, wanted, strict=True):
        if layout is not None:
            machine.put(number, next(results), layout)


LOOP_EMITTERS: dict[str, Callable[[Machine, int, Step, Run], None]] = {
    "scan": emit_scan,
    "while": emit_while,
    "cond": emit_cond,
}


def _operands(
    machine: Machine, outside: Sequence[Atom], inside: Sequence[Atom], plan: Plan, leading_axes: int = 0
) -> list[Operand]:
    """The operands that a body needs, in the layouts of its plan, apart from leading axes that the body's operands lack."""
    operands = []
    for number, own in zip(outside, inside, strict=True):
        layout = plan.layouts[own]
        if layout is not None:
            operands.append((own, machine.get(number, (*(None,) * leading_axes, *layout)), layout))
    return operands


def _with(operands: Sequence[Operand], values: Sequence[Any]) -> list[Operand]:
    """The operands with other values."""
    return [(number, value, layout) for (number, _, layout), value in zip(operands, values, strict=True)]


def _by_number(*operands: Sequence[Operand]) -> dict[Atom, tuple[Any, Layout]]:
    return {number: (value, layout) for each in operands for number, value, layout in each}


def _expanded(operands: Sequence[Operand], numbers: Sequence[Atom]) -> list[Any]:
    """The values of the operands by number; None for a number without an operand."""
    values = {number: value for number, value, _ in operands}
    return [values.get(number) for number in numbers]


def _carry(body: Program, values: Sequence[Any]) -> list[Any]:
    """The needed values that are passed on, without weak types: these must not change between iterations."""
    return [
        _strong(value, body, number) for number, value in zip(body.outputs, values, strict=False) if value is not None
    ]


def _strong(value: Any, body: Program, number: Atom) -> Any:
    dtype = body.shapes[number].dtype
    return lax.convert_element_type(value, dtype) if is_plain(dtype) else value


def _put_carry(machine: Machine, outputs: Sequence[Atom], kept: Sequence[Layout | None], values: Sequence[Any]) -> None:
    rest = iter(values)
    for number, layout in zip(outputs, kept, strict=True):
        if layout is not None:
            machine.put(number, next(rest), layout)
