"""Finds the elements of a program's values that are constant, and the elements that its results depend on.

The analysis passes over the steps twice. The forward pass propagates constants: an element is *known* if it follows from params and
constants alone, such as a channel behind a column of zeros. The backward pass propagates liveness: an element is *live* if an unknown
result depends on it. The small program of ``shrink`` leaves out elements that are known or not live.

The rule of a primitive maps elements of its outputs to the elements they depend on in its inputs. A primitive without a rule reads every
element, and all its results are unknown. The bodies of loops are analysed like programs. All values are assumed to be finite: 0 times an
unknown number is 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import (
    Analysis,
    Fact,
    Flags,
    Product,
    any_along,
    as_data,
    compact,
    known_fact,
    only_zeros,
    unknown_fact,
)
from bcdl_jax.graph.known_values import values_of, without_checks
from bcdl_jax.graph.loops import loop_backward, loop_forward
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.products import known_results, product_needs, product_rule
from bcdl_jax.graph.program import Program, Step
from bcdl_jax.graph.rules import REDUCTIONS, Known, flow_rule, no_elements_known
from bcdl_jax.graph.structural import STRUCTURAL


def analyze(program: Program, params: Sequence[Any], moving: Moving) -> Analysis:
    """Finds the constant elements and the live elements of all values.

    Args:
      program: A program, traced at the shapes of params and of example inputs.
      params: The flattened params, the first arguments of the program.
      moving: The parts of the program that depend on the batch size. An element is known only if it is known, and equal, at all indices
        along axes that depend on it.

    Returns:
      Facts about values and products.
    """
    arguments = [_unknown(program, number) for number in program.inputs]
    for place, value in enumerate(params):
        dtype = program.shapes[program.inputs[place]].dtype
        if is_plain(dtype):
            arguments[place] = _fixed(value, dtype)
    return _analyzed(program, arguments, moving, zeros_only=False)


def analyze_zeros(program: Program, params: Sequence[Flags], moving: Moving) -> Analysis:
    """Finds the elements that are 0 whatever the values of params are, and the live elements of all values.

    No other elements are known, except in values that are computed from constants alone. So a nonzero constant is live if a result depends on
    it.

    Args:
      program: A program, traced at the shapes of params and of example inputs.
      params: Flags of the elements of each param that may differ from 0.
      moving: The parts of the program that depend on the batch size.

    Returns:
      Facts about values and products. The live elements of a param are those that differ from 0 and that a result depends on.
    """
    arguments = [_unknown(program, number) for number in program.inputs]
    arguments[: len(params)] = [
        dataclasses.replace(fact, unknown=flags) for fact, flags in zip(arguments, params, strict=False)
    ]
    return _analyzed(program, arguments, moving, zeros_only=True)


def _analyzed(program: Program, arguments: Sequence[Fact], moving: Moving, zeros_only: bool) -> Analysis:
    with without_checks():
        found = forward(program, arguments, moving, zeros_only)
        lives = [found.facts[number].unknown | found.facts[number].fixed for number in program.outputs]
        return backward(program, found, lives)


# The forward pass.


def forward(program: Program, arguments: Sequence[Fact], moving: Moving, zeros_only: bool = False) -> Analysis:
    """The known elements of all values. Nothing is live yet.

    Args:
      program: A program.
      arguments: Facts about its arguments.
      moving: The parts of the program that depend on the batch size.
      zeros_only: True to know only the zeros of values that are not fixed.
    """
    facts: dict[int, Fact] = {}
    for number, value in program.constants.items():
        dtype = program.shapes[number].dtype
        is_known = is_plain(dtype) and number not in moving.constants
        facts[number] = _fixed(value, dtype) if is_known else _unknown(program, number)
    facts |= dict(zip(program.inputs, arguments, strict=True))
    bodies: dict[int, tuple[Analysis, ...]] = {}
    for index, step in enumerate(program.steps):
        inputs = [facts[number] for number in step.inputs]
        fixed = all(fact.fixed for fact in inputs)
        if fixed and _depends_on_batch_size(step, moving):
            inputs, fixed = [as_data(fact) for fact in inputs], False
        outputs: Sequence[Known] | None = None
        if all(is_plain(program.shapes[number].dtype) for number in (*step.inputs, *step.outputs)):
            outputs = _known_elements(step, inputs, fixed, program, moving)
        if outputs is None and not fixed and index in moving.bodies:
            outputs, bodies[index] = loop_forward(
                step, inputs, moving.bodies[index], functools.partial(forward, zeros_only=zeros_only)
            )
        for place, number in enumerate(step.outputs):
            known = None if outputs is None or not is_plain(program.shapes[number].dtype) else outputs[place]
            if known is None or (not fixed and known[0].all()):
                facts[number] = _unknown(program, number)
                continue
            fact = known_fact(known[0], known[1].astype(program.shapes[number].dtype, copy=False), fixed)
            fact = _same_for_all_examples(fact, moving.axes[number])
            facts[number] = only_zeros(fact) if zeros_only and not fixed else fact
    return Analysis(tuple(facts[number] for number in range(len(program.shapes))), {}, frozenset(), bodies)


def _unknown(program: Program, number: int) -> Fact:
    struct = program.shapes[number]
    return unknown_fact(len(struct.shape), struct.dtype if is_plain(struct.dtype) else np.float32)


def _fixed(value: Any, dtype: Any) -> Fact:
    """The fact about a param or constant."""
    array = np.asarray(value)
    return known_fact(np.zeros((1,) * array.ndim, bool), array.astype(dtype, copy=False), True)


# The operands whose elements the results of a step are. Data choose among them, or they lie beside data.
_CHOSEN = {
    "concatenate": slice(0, None),
    "dynamic_slice": slice(0, 1),
    "gather": slice(0, 1),
    "select_n": slice(1, None),
}


def _known_elements(
    step: Step, inputs: Sequence[Fact], is_fixed: bool, program: Program, moving: Moving
) -> Sequence[Known] | None:
    """The known elements of each output of a step, or None if all are unknown."""
    if not step.inputs and not is_fixed:
        return None
    product = product_rule(step, program)
    rule = flow_rule(step, program) if product is None else None
    if is_fixed and not _only_moves_elements(step) and step.inputs and not any(fact.unknown.any() for fact in inputs):
        shapes = [program.shapes[number].shape for number in step.inputs]
        full = [np.broadcast_to(fact.value, shape) for fact, shape in zip(inputs, shapes, strict=True)]
        return [(np.zeros((1,) * value.ndim, bool), value) for value in values_of(step, full)]
    if not is_fixed:
        # Params among data stay params, such as a class token, or an expert that data choose.
        chosen = range(len(inputs))[_CHOSEN.get(step.name, slice(0))]
        inputs = [as_data(fact) if place in chosen else fact for place, fact in enumerate(inputs)]
    if rule is not None:
        outputs = rule.forward(inputs)
    elif product is not None:
        outputs = [known_results(product, step, *inputs)]
    elif is_fixed and step.inputs:
        return [no_elements_known(len(program.shapes[number].shape)) for number in step.outputs]
    else:
        return None
    if _sums_over_batch(step, moving):
        outputs = [(unknown | (value != 0), value) for unknown, value in outputs]
    return outputs


def _only_moves_elements(step: Step) -> bool:
    return step.elementwise or step.name in STRUCTURAL


def _depends_on_batch_size(step: Step, moving: Moving) -> bool:
    """Whether a step whose inputs are fixed computes other elements at other batch sizes, such as positions in the batch."""
    if step.name == "iota":
        return step.params["dimension"] in moving.axes[step.outputs[0]]
    return not _only_moves_elements(step) and any(moving.axes[number] for number in (*step.inputs, *step.outputs))


def _sums_over_batch(step: Step, moving: Moving) -> bool:
    """Whether the results of a step depend on the number of examples, since it sums over them."""
    axes: Sequence[int] = ()
    if step.name in REDUCTIONS:
        axes = step.params["axes"]
    elif step.name == "dot_general":
        axes = step.params["dimension_numbers"][0][0]
    return not moving.axes[step.inputs[0]].isdisjoint(axes) if step.inputs else False


def _same_for_all_examples(fact: Fact, axes: frozenset[int]) -> Fact:
    """The fact in which an element is known only if it is known, and equal, at all indices along the given axes."""
    if fact.fixed or not axes:
        return fact
    first = fact.value
    for axis in axes:
        first = np.take(first, [0], axis)
    unknown = any_along(fact.unknown | (fact.value != first), tuple(axes))
    return known_fact(unknown, first, False)


# The backward pass.


def backward(program: Program, found: Analysis, lives: Sequence[Flags]) -> Analysis:
    """The live elements of all values.

    Args:
      program: A program.
      found: The result of the forward pass.
      lives: Flags of the live elements of each result of the program.
    """
    live = [np.zeros((1,) * len(shape.shape), bool) for shape in program.shapes]
    allowed = [fact.unknown | fact.fixed for fact in found.facts]
    for number, flags in zip(program.outputs, lives, strict=True):
        live[number] = live[number] | (flags & allowed[number])
    products: dict[int, Product] = {}
    bodies: dict[int, tuple[Analysis, ...]] = {}
    opaque: set[int] = set()
    for index, step in reversed(list(enumerate(program.steps))):
        if not any(live[number].any() for number in step.outputs):
            continue
        inputs = [found.facts[number] for number in step.inputs]
        needed = [live[number] for number in step.outputs]
        if (product := product_rule(step, program)) is not None:
            needs, products[index] = product_needs(product, inputs, found.facts[step.outputs[0]].with_live(needed[0]))
        elif (rule := flow_rule(step, program)) is not None:
            needs = rule.backward(inputs, needed)
        elif index in found.bodies:
            needs, bodies[index] = loop_backward(step, found.bodies[index], needed, backward)
        else:
            opaque.add(index)
            needs = [np.ones((1,) * fact.unknown.ndim, bool) for fact in inputs]
        for number, need in zip(step.inputs, needs, strict=True):
            live[number] = compact(live[number] | (need & allowed[number]))
    facts = tuple(fact.with_live(flags) for fact, flags in zip(found.facts, live, strict=True))
    return Analysis(facts, products, frozenset(opaque), bodies)
