"""The flow of elements through loops and branches: ``scan``, ``while`` and ``cond``.

The body of a loop is a program of its own, and is analysed as such. Its facts hold in all iterations. The facts about values that an
iteration passes on to the next are a fixed point: the analysis is repeated until they do not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from bcdl_jax.graph.facts import Analysis, Fact, Flags, any_along, as_data, compact, known_fact, same_flags
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.program import Program, Step
from bcdl_jax.graph.rules import Known

Forward = Callable[[Program, Sequence[Fact], Moving], Analysis]
Backward = Callable[[Program, Analysis, Sequence[Flags]], Analysis]

# After so many iterations, a value that still changes counts as unknown as a whole. A delay line would need one iteration per element.
_MAX_ITERATIONS = 8


def split_operands(step: Step) -> tuple[slice, slice, slice]:
    """The operands of a scan or while: constants of the body, values that are passed on, and stacks with one slice per iteration.

    The operands in front of the constants of the body are the constants of the condition. A scan has none.
    """
    if step.name == "scan":
        first, last = step.params["num_consts"], step.params["num_consts"] + step.params["num_carry"]
        return slice(0, first), slice(first, last), slice(last, len(step.inputs))
    first, last = step.params["cond_nconsts"], step.params["cond_nconsts"] + step.params["body_nconsts"]
    return slice(first, last), slice(last, len(step.inputs)), slice(len(step.inputs), len(step.inputs))


def loop_forward(
    step: Step, inputs: Sequence[Fact], moving: Sequence[Moving], forward: Forward
) -> tuple[list[Known], tuple[Analysis, ...]]:
    """The known elements of each output of a loop or branch.

    Args:
      step: The step.
      inputs: Facts about its operands.
      moving: The parts of its bodies that depend on the batch size.
      forward: The forward pass through a program.

    Returns:
      The known elements, and the results of the forward passes through the bodies.
    """
    if step.name == "cond":
        return _branches_forward(step, inputs, moving, forward)
    parts = split_operands(step)
    constants, carried, stacks = (inputs[part] for part in parts)
    for_condition = inputs[: parts[0].start]
    slices = [_slice_of(fact) for fact in stacks]
    body, body_moving = step.bodies[-1], moving[-1]
    carried = [as_data(fact) for fact in carried]
    count = 0
    while True:
        found = forward(body, [*constants, *carried, *slices], body_moving)
        results = [as_data(found.facts[number]) for number in body.outputs]
        joined = [_joined(old, new, count < _MAX_ITERATIONS) for old, new in zip(carried, results, strict=False)]
        if all(same_flags(old.unknown, new.unknown) for old, new in zip(carried, joined, strict=True)):
            break
        carried, count = joined, count + 1
    outputs = [(fact.unknown, fact.value) for fact in carried]
    for fact in results[len(carried) :]:
        outputs.append((fact.unknown[None], fact.value[None]))
    if step.name == "scan":
        return outputs, (found,)
    condition = forward(step.bodies[0], [*for_condition, *carried], moving[0])
    return outputs, (condition, found)


def loop_backward(
    step: Step, found: Sequence[Analysis], lives: Sequence[Flags], backward: Backward
) -> tuple[list[Flags], tuple[Analysis, ...]]:
    """Flags of the elements that a loop or branch reads from each operand.

    Args:
      step: The step.
      found: The results of the forward passes through its bodies.
      lives: Flags of the live elements of each output.
      backward: The backward pass through a program.

    Returns:
      The flags, and the analyses of the bodies.
    """
    if step.name == "cond":
        return _branches_backward(step, found, lives, backward)
    constants, carried, stacks = split_operands(step)
    body, num_carried = step.bodies[-1], carried.stop - carried.start
    num_constants = constants.stop - constants.start
    carried_inputs = body.inputs[num_constants : num_constants + num_carried]
    live = list(lives[:num_carried])
    others = [np.asarray(flags.any(0)) for flags in lives[num_carried:]]
    analyses: tuple[Analysis, ...] = ()
    needs_of_condition: list[Flags] = []
    if step.name == "while":
        condition = step.bodies[0]
        analysis = backward(condition, found[0], [np.ones((), bool)])
        needs = [analysis.facts[number].live for number in condition.inputs]
        needs_of_condition = needs[: constants.start]
        live = [flags | need for flags, need in zip(live, needs[constants.start :], strict=True)]
        analyses = (analysis,)
    while True:
        analysis = backward(body, found[-1], [*live, *others])
        needs = [analysis.facts[number].live for number in carried_inputs]
        joined = [flags | need for flags, need in zip(live, needs, strict=True)]
        if all(same_flags(old, new) for old, new in zip(live, joined, strict=True)):
            break
        live = joined
    # An element may be live although the body does not read it: it is passed on, and is read in the end.
    analysis = _with_live(analysis, dict(zip(carried_inputs, live, strict=True)))
    needs = [analysis.facts[number].live for number in body.inputs]
    count = len(body.inputs) - (stacks.stop - stacks.start)
    needs = needs[:count] + [flags[None] for flags in needs[count:]]
    return [*needs_of_condition, *needs], (*analyses, analysis)


def _with_live(analysis: Analysis, live: dict[int, Flags]) -> Analysis:
    """An analysis with other live flags of some values."""
    facts = list(analysis.facts)
    for number, flags in live.items():
        facts[number] = dataclasses.replace(facts[number], live=flags)
    return dataclasses.replace(analysis, facts=tuple(facts))


def _slice_of(stack: Fact) -> Fact:
    """The fact about any slice of a stack along its leading axis. An element is known if it is known, and equal, in all slices."""
    first = stack.value[:1]
    unknown = any_along(stack.unknown, [0])
    if stack.value.shape[0] != 1:
        unknown = unknown | any_along(stack.value != first, [0])
    return known_fact(compact(unknown)[0], first[0], stack.fixed)


def _joined(old: Fact, new: Fact, element_by_element: bool) -> Fact:
    """The fact that holds before and after an iteration."""
    unknown = old.unknown | new.unknown | (old.value != new.value)
    if not element_by_element and not same_flags(unknown, old.unknown):
        unknown = np.ones((1,) * unknown.ndim, bool)
    return known_fact(compact(unknown), old.value, False)


def _branches_forward(
    step: Step, inputs: Sequence[Fact], moving: Sequence[Moving], forward: Forward
) -> tuple[list[Known], tuple[Analysis, ...]]:
    found = tuple(forward(body, inputs[1:], each) for body, each in zip(step.bodies, moving, strict=True))
    outputs: list[Known] = []
    for place in range(len(step.outputs)):
        results = [
            as_data(analysis.facts[body.outputs[place]]) for body, analysis in zip(step.bodies, found, strict=True)
        ]
        unknown = results[0].unknown
        for fact in results[1:]:
            unknown = unknown | fact.unknown | (fact.value != results[0].value)
        outputs.append((compact(unknown), results[0].value))
    return outputs, found


def _branches_backward(
    step: Step, found: Sequence[Analysis], lives: Sequence[Flags], backward: Backward
) -> tuple[list[Flags], tuple[Analysis, ...]]:
    analyses = tuple(backward(body, each, lives) for body, each in zip(step.bodies, found, strict=True))
    needs: list[Flags] = [np.ones((), bool)]
    for place in range(len(step.inputs) - 1):
        each = [analysis.facts[body.inputs[place]].live for body, analysis in zip(step.bodies, analyses, strict=True)]
        flags = each[0]
        for other in each[1:]:
            flags = flags | other
        needs.append(flags)
    return needs, analyses
