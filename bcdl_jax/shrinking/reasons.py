"""Explains why a small network keeps zeros, and weights of channels that are constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bcdl_jax.graph.facts import Analysis, Fact, along
from bcdl_jax.graph.primitives import MOVES
from bcdl_jax.graph.products import product_rule
from bcdl_jax.graph.program import Atom, Program, Step
from bcdl_jax.shrinking.layouts import Layout, indices
from bcdl_jax.shrinking.plan import Plan

Reason = tuple[str, int]  # The reason, and the number of elements that are kept for it.

# Primitives that move or cast the elements of an array.
_MOVES = MOVES | {"convert_element_type"}


def reasons_for_kept(program: Program, analysis: Analysis, plan: Plan, numbers: Sequence[Atom]) -> list[Reason | None]:
    """The reasons why arrays keep elements that a full removal of dead channels would save.

    Args:
      program: The program of the whole network.
      analysis: The analysis of the program.
      plan: The plan of the small program.
      numbers: Numbers of the arrays of the params.

    Returns:
      The reason and the number of elements for each array; None if all dead channels are gone.
    """
    opaque = _opaque_readers(program, analysis)
    makers = {step.outputs[0]: step for step in program.steps if len(step.outputs) == 1}
    constants = _kept_for_constants(program, analysis, plan, makers)
    added = _only_added(program, makers)
    reasons: list[Reason | None] = []
    for number in numbers:
        layout, reason = plan.layouts[number], None
        if layout is not None:
            fact, shape = analysis.facts[number], program.shapes[number].shape
            if number not in added and (count := _elements_of_zero_slices(fact, layout, shape)):
                reason = (f"zeros kept: {_reader(number, program, analysis, opaque)}", count)
            else:
                reason = constants.get(number)
        reasons.append(reason)
    return reasons


def _opaque_readers(program: Program, analysis: Analysis) -> dict[Atom, set[str]]:
    """For each value, the names of the primitives without a rule that depend on it."""
    readers: dict[Atom, set[str]] = {}
    for index, step in reversed(list(enumerate(program.steps))):
        names = {step.name} if index in analysis.opaque else set()
        if index in analysis.bodies:
            for body, inner in zip(step.bodies, analysis.bodies[index], strict=True):
                names |= {body.steps[place].name for place in inner.opaque}
        for number in step.outputs:
            names |= readers.get(number, set())
        for number in step.inputs:
            readers.setdefault(number, set()).update(names)
    return readers


def _elements_of_zero_slices(fact: Fact, layout: Layout, shape: tuple[int, ...]) -> int:
    """The number of elements in kept and needed slices of a fixed array, across one of several axes, that hold zeros alone."""
    if not fact.fixed or fact.value.ndim < 2:
        return 0
    before, after = 1, 1
    for axis, kept in enumerate(layout):
        nonzero, live = (along(flags, axis, shape[axis]) for flags in (fact.nonzero, fact.live))
        places = indices(kept, shape[axis])
        before *= len(places)
        after *= len(places) - int((live & ~nonzero)[places].sum())
    return before - after


def _reader(number: Atom, program: Program, analysis: Analysis, opaque: dict[Atom, set[str]]) -> str:
    """The reason why the small network keeps the zeros of an array."""
    if names := ", ".join(sorted(opaque.get(number, set()))):
        return f"read whole by {names}"
    step = _first_mixer(number, program, analysis)
    if step is None:
        return "other parts need them"
    return f"needed by {step.name}" + (f" in {step.scope}" if step.scope else "")


def _first_mixer(number: Atom, program: Program, analysis: Analysis) -> Step | None:
    """The first step that combines known elements which follow from an array with unknown elements."""
    reached = {number}
    for step in program.steps:
        if reached.isdisjoint(step.inputs) or not analysis.facts[step.outputs[0]].live.any():
            continue
        known = [_has_known(analysis.facts[each]) for each in step.outputs]
        data = [analysis.facts[each] for each in step.inputs if not analysis.facts[each].fixed]
        if not any(known) and any(_has_known(fact) for fact in data):
            return step
        reached.update(step.outputs)
    return None


def _has_known(fact: Fact) -> bool:
    return not fact.unknown.all()


def _only_added(program: Program, makers: Mapping[Atom, Step]) -> set[Atom]:
    """Values that are only added to others, such as biases. Their zeros do not make a channel dead."""
    added: set[Atom] = set()
    used: set[Atom] = set()
    for step in program.steps:
        if step.name not in _MOVES:
            (added if step.name in ("add", "sub") else used).update(_origin(number, makers) for number in step.inputs)
    return added - used


def _kept_for_constants(
    program: Program, analysis: Analysis, plan: Plan, makers: Mapping[Atom, Step]
) -> dict[Atom, Reason]:
    """Arrays with elements that only multiply channels which do not depend on the inputs."""
    reasons: dict[Atom, Reason] = {}
    for index, step in enumerate(program.steps):
        if index in analysis.products:
            reason = _rows_of_constants(index, step, program, analysis, plan)
            if reason is not None:
                reasons[_origin(step.inputs[1], makers)] = reason
    return reasons


def _rows_of_constants(index: int, step: Step, program: Program, analysis: Analysis, plan: Plan) -> Reason | None:
    """The kernel elements that a product keeps for constant channels, if its second operand is computed from params alone."""
    x, w = (analysis.facts[number] for number in step.inputs)
    rule = product_rule(step, program)
    layout = plan.layouts[step.inputs[1]]
    if rule is None or x.fixed or not w.fixed or layout is None:
        return None
    count = 0
    for place, (x_axis, w_axis) in enumerate(zip(*rule.contracted, strict=True)):
        size = rule.shapes[0][x_axis]
        if rule.shapes[1][w_axis] != size:  # A grouped convolution.
            continue
        constant = ~along(x.unknown, x_axis, size) & analysis.products[index].needed[place]
        rows = layout[w_axis]
        kept = constant if rows is None else constant[rows]
        sizes = [len(indices(each, whole)) for each, whole in zip(layout, rule.shapes[1], strict=True)]
        count += int(kept.sum()) * int(np.prod([each for axis, each in enumerate(sizes) if axis != w_axis]))
    return ("constant channels kept: they cannot become a bias of the outputs", count) if count else None


def _origin(number: Atom, makers: Mapping[Atom, Step]) -> Atom:
    """The value whose elements were moved or cast to a value. ``makers`` holds the step that computes each value."""
    while number in makers and makers[number].name in _MOVES:
        number = makers[number].inputs[0]
    return number
