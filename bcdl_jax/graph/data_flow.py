"""Finds the elements of a program's values that are constant, and the elements that its results depend on.

The analysis passes over the steps twice. The forward pass propagates constants: an element is *known* if it follows from params and
constants alone, such as a channel behind a column of zeros. The backward pass propagates liveness: an element is *live* if an unknown
result depends on it. The small program of ``shrink`` leaves out elements that are known or not live.

The facts are numpy arrays of the traced shapes. The rule of a primitive maps elements of its outputs to the elements they depend on in its
inputs. A primitive without a rule reads every element, and all its results are unknown. All values are assumed to be finite: 0 times an
unknown number is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Analysis, Fact, Flags, Product, compact, known_fact, unknown_fact
from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.products import PRODUCTS, product_needs, product_rule, unknown_results
from bcdl_jax.graph.program import Atom, Program, Step
from bcdl_jax.graph.rules import STRUCTURAL, flow_rule


def analyze(
    program: Program,
    values: Sequence[Any],
    num_params: int,
    moving_axes: Sequence[frozenset[int]],
    moving_constants: frozenset[Atom],
) -> Analysis:
    """Finds the constant elements and the live elements of all values.

    Args:
      program: A program, traced at the shapes of params and of example inputs.
      values: All values of the program for params and example inputs, from ``Program.evaluate``.
      num_params: The number of the program's inputs that are params. They come first.
      moving_axes: The axes of each value whose size depends on the batch size. An element is known only if it is known, and equal, at all
        indices along them.
      moving_constants: Numbers of the constants that depend on the batch size. They count as unknown.

    Returns:
      Facts about values and products.
    """
    facts = _constants(program, values, num_params, moving_axes, moving_constants)
    for number in program.outputs:
        facts[number].live |= facts[number].unknown | facts[number].fixed
    products: dict[int, Product] = {}
    opaque: set[int] = set()
    for index, step in reversed(list(enumerate(program.steps))):
        if not any(facts[number].live.any() for number in step.outputs):
            continue
        inputs, outputs = [facts[number] for number in step.inputs], [facts[number] for number in step.outputs]
        if (product := product_rule(step, program)) is not None:
            needs, products[index] = product_needs(product, inputs, outputs[0])
        elif (rule := flow_rule(step, program)) is not None:
            needs = rule.backward(inputs, [fact.live for fact in outputs])
        else:
            opaque.add(index)
            needs = [np.ones(fact.live.shape, bool) for fact in inputs]
        for fact, need in zip(inputs, needs, strict=True):
            fact.live |= need & (fact.unknown | fact.fixed)
    return Analysis([compact(fact) for fact in facts], products, frozenset(opaque))


def wholly_unknown(program: Program, num_params: int) -> frozenset[Atom]:
    """Numbers of values that are unknown in every element, whatever the params. ``analyze`` does not need their values.

    There may be more such values. These include most of the values that are computed from keys and inputs before the first params.
    """
    unknown = set(program.inputs[num_params:])
    nonzero = {
        number
        for number, value in program.constants.items()
        if is_plain(program.shapes[number].dtype) and np.all(np.asarray(value) != 0)
    }
    for step in program.steps:
        known = [number not in unknown for number in step.inputs]
        if known and not any(known):
            found = step.elementwise or step.name in STRUCTURAL or _has_no_rule(step, program)
        elif all(known):
            if step.name in ("broadcast_in_dim", "reshape") and step.inputs[0] in nonzero:
                nonzero.update(step.outputs)
            continue
        elif step.name == "mul":
            found = nonzero.issuperset(set(step.inputs) - unknown)
        elif step.name == "div":
            found = not known[0] or step.inputs[0] in nonzero
        else:
            found = (step.elementwise and step.name != "select_n") or _has_no_rule(step, program)
        if found:
            unknown.update(step.outputs)
    return frozenset(unknown)


def _has_no_rule(step: Step, program: Program) -> bool:
    return step.name not in PRODUCTS and flow_rule(step, program) is None


def _constants(
    program: Program,
    values: Sequence[Any],
    num_params: int,
    moving_axes: Sequence[frozenset[int]],
    moving_constants: frozenset[Atom],
) -> list[Fact]:
    """The forward pass. Returns facts in which nothing is live yet."""
    facts = [unknown_fact(shape.shape) for shape in program.shapes]
    for number in [*program.inputs[:num_params], *program.constants]:
        if is_plain(program.shapes[number].dtype) and number not in moving_constants:
            facts[number] = known_fact(np.zeros(program.shapes[number].shape, bool), values[number], True)
    for step in program.steps:
        fixed = all(facts[number].fixed for number in step.inputs)
        for number, unknown in zip(step.outputs, _forward(step, facts, program, moving_axes), strict=True):
            if unknown is not None:
                facts[number] = _same_for_all_examples(known_fact(unknown, values[number], fixed), moving_axes[number])
    return facts


def _forward(
    step: Step, facts: Sequence[Fact], program: Program, moving_axes: Sequence[frozenset[int]]
) -> Sequence[Flags | None]:
    """For each output, flags of the unknown elements, or None if all are unknown."""
    inputs = [facts[number] for number in step.inputs]
    all_unknown = [None] * len(step.outputs)
    if any(not is_plain(program.shapes[number].dtype) for number in (*step.inputs, *step.outputs)):
        return all_unknown
    if all(fact.fixed for fact in inputs):
        if _depends_on_batch_size(step, moving_axes):
            return all_unknown
        return [np.zeros(program.shapes[number].shape, bool) for number in step.outputs]
    if step.name == "concatenate":
        # Params that are concatenated with data, such as a class token, stay params. They must not become a folded constant.
        inputs = [
            dataclasses.replace(fact, unknown=fact.nonzero, value=np.zeros_like(fact.value)) if fact.fixed else fact
            for fact in inputs
        ]
    if (rule := flow_rule(step, program)) is not None:
        return rule.forward(inputs)
    if (product := product_rule(step, program)) is not None:
        return [unknown_results(product, *inputs)]
    return all_unknown


def _depends_on_batch_size(step: Step, moving_axes: Sequence[frozenset[int]]) -> bool:
    """Whether a step whose inputs are fixed computes other elements at other batch sizes, such as positions in the batch."""
    if step.name == "iota":
        return step.params["dimension"] in moving_axes[step.outputs[0]]
    moves_elements_only = step.elementwise or step.name in STRUCTURAL
    return not moves_elements_only and any(moving_axes[number] for number in (*step.inputs, *step.outputs))


def _same_for_all_examples(fact: Fact, axes: frozenset[int]) -> Fact:
    """The fact in which an element is known only if it is known, and equal, at all indices along the given axes."""
    if fact.fixed:
        return fact
    unknown = fact.unknown
    for axis in axes:
        differs = fact.value != np.take(fact.value, [0], axis)
        unknown = unknown | (unknown | differs).any(axis, keepdims=True)
    return dataclasses.replace(fact, unknown=unknown, value=np.where(unknown, 0, fact.value))
