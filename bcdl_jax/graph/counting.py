"""Counts the multiply-adds of a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bcdl_jax.graph.primitives import CALLS, CUSTOM, bodies, inner_jaxpr
from bcdl_jax.graph.program import Program


def multiply_adds(program: Program) -> int:
    """The number of multiplications in all matrix products and convolutions of a program, at the traced batch size.

    The body of a ``scan`` counts once for each iteration. The body of any other loop counts once, since the number of its iterations is
    unknown. A ``cond`` counts its most expensive branch.
    """
    return sum(_equation_multiply_adds(step.equation) for step in program.steps)


def multiply_adds_by_owner(program: Program, owners: Sequence[int | None]) -> dict[int | None, int]:
    """The multiply-adds of a program, split among the owners of its arguments.

    Args:
      program: A program.
      owners: The owner of each flattened argument, such as the number of a layer; None for data.

    Returns:
      The multiply-adds by owner. An owner's products multiply data by values that were computed from its arguments alone. All other
      products count under None.
    """
    # The owners of the arguments that a value was computed from. None means data.
    sources = {number: {owner} for number, owner in zip(program.inputs, owners, strict=True)}
    totals: dict[int | None, int] = dict.fromkeys([None, *owners], 0)
    for step in program.steps:
        operands = [sources.get(number, set()) for number in step.inputs]
        if count := _equation_multiply_adds(step.equation):
            # A loop may read several arguments of one owner.
            weights = set().union(*(operand for operand in operands if None not in operand))
            owner = weights.pop() if len(weights) == 1 and any(None in operand for operand in operands) else None
            totals[owner] += count
        for number in step.outputs:
            sources[number] = set().union(*operands)
    return totals


def _equation_multiply_adds(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        sizes = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(sizes[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return equation.outvars[0].aval.size * (kernel.size // max(features, 1))
    if name not in ("scan", "while", "cond", *CALLS, *CUSTOM):
        return 0
    call = inner_jaxpr(equation)
    inner = [closed.jaxpr for closed in bodies(equation)] if call is None else [call[0]]
    counts = [sum(map(_equation_multiply_adds, jaxpr.eqns)) for jaxpr in inner]
    if name == "cond":
        return max(counts)
    return sum(counts) * (params["length"] if name == "scan" else 1)
