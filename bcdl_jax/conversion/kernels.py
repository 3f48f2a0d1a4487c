"""Finds the arrays of a traced network that can become variational: the kernels of its matrix products and convolutions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from bcdl_jax.conversion.layouts import KernelLayout, ProductLayout, convolution_layout, dot_layout
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.products import PRODUCTS
from bcdl_jax.graph.program import Atom, Program, Step, data_dependent

# Primitives that move or cast the elements of their only operand, one to one.
_MOVES = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "rev", "squeeze", "transpose"]
)


@dataclasses.dataclass(frozen=True)
class Bias:
    """An array of the params that is added to the outputs of a product, one element for each output.

    Attributes:
      place: The number of the array in the order of ``jax.tree.leaves(params)``.
      shape: Its shape.
      step: The index of the step that adds it.
      outputs: The number of the other operand of this step: the product, or the product after steps that move it.
      moved: Indices of the steps that only move the bias towards this step.
    """

    place: int
    shape: tuple[int, ...]
    step: int
    outputs: Atom
    moved: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An array of the params that becomes the kernel of a variational layer.

    Attributes:
      layout: The relation between the array and the kernel [*window, in / feature groups, out] of a posterior.
      products: The layout of each product that reads the array, by the index of its step.
      moved: Indices of the steps that only move the array towards its products.
      bias: The bias of the layer, or None.
    """

    layout: KernelLayout
    products: dict[int, ProductLayout]
    moved: frozenset[int]
    bias: Bias | None = None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a network.

    Attributes:
      found: The kernels, by the number of the array in the order of ``jax.tree.leaves(params)``.
      reasons: The reason for each array that is no kernel, by its number: a clause such as "it is read by add".
    """

    found: dict[int, Kernel]
    reasons: dict[int, str]


class NotAKernel(Exception):
    """The reason why an array cannot become variational."""


def find_kernels(program: Program, moving: Moving, num_params: int) -> Kernels:
    """Finds the arrays of the params that reach only products with data, by steps that only move or cast their elements.

    Args:
      program: A network, whose first inputs are the params.
      moving: The parts of the program that depend on the batch size.
      num_params: The number of arrays of the params.
    """
    readers = _readers(program)
    depends = data_dependent(program, num_params)
    found, reasons = dict[int, Kernel](), dict[int, str]()
    for place, number in enumerate(program.inputs[:num_params]):
        try:
            found[place] = _kernel(program, moving, number, readers, depends)
        except NotAKernel as reason:
            reasons[place] = str(reason)
    for place, kernel in found.items():
        if (bias := _bias(program, kernel, readers, num_params)) is not None:
            found[place] = dataclasses.replace(kernel, bias=bias)
    return Kernels(found, reasons)


def _readers(program: Program) -> dict[Atom, list[int]]:
    """The indices of the steps that read each value."""
    readers: dict[Atom, list[int]] = {}
    for index, step in enumerate(program.steps):
        for number in dict.fromkeys(step.inputs):
            readers.setdefault(number, []).append(index)
    return readers


def _kernel(
    program: Program, moving: Moving, number: Atom, readers: dict[Atom, list[int]], depends: set[Atom]
) -> Kernel:
    """The kernel at a param."""
    struct = program.shapes[number]
    if not jnp.issubdtype(struct.dtype, jnp.floating):
        raise NotAKernel(f"it has the type {struct.dtype}")
    if number in program.outputs:
        raise NotAKernel("the network returns it")
    chains: list[tuple[Atom, tuple[int, ...]]] = [(number, ())]
    moved, products = set[int](), dict[int, ProductLayout]()
    layout: KernelLayout | None = None
    while chains:
        value, chain = chains.pop()
        for index in readers.get(value, []):
            step = program.steps[index]
            if step.name in _MOVES and _keeps_elements(program, step):
                if step.outputs[0] in program.outputs:
                    raise NotAKernel("the network returns it")
                moved.add(index)
                chains.append((step.outputs[0], (*chain, index)))
                continue
            product = _product(program, moving, step, value, depends)
            own = KernelLayout(struct.shape, tuple(program.steps[each] for each in chain), product.canonical)
            if layout is not None and not own.is_equal(layout):
                raise NotAKernel("its products read it in different layouts")
            layout = layout or own
            products[index] = product
    if layout is None:
        raise NotAKernel("nothing reads it")
    return Kernel(layout, products, frozenset(moved))


def _keeps_elements(program: Program, step: Step) -> bool:
    before, after = (math.prod(program.shapes[number].shape) for number in (step.inputs[0], step.outputs[0]))
    return len(step.inputs) == 1 and before == after


def _product(program: Program, moving: Moving, step: Step, kernel: Atom, depends: set[Atom]) -> ProductLayout:
    """The layout of the product that reads a kernel."""
    where = f" at {step.scope}" if step.scope else ""
    if step.name not in PRODUCTS:
        raise NotAKernel(f"it is read by {step.name}{where}")
    side = step.inputs.index(kernel)
    data = step.inputs[1 - side]
    if data not in depends or data == kernel:
        raise NotAKernel(f"its product{where} reads no data")
    shapes: Sequence[tuple[int, ...]] = [program.shapes[number].shape for number in step.inputs]
    make = dot_layout if step.name == "dot_general" else convolution_layout
    product = make(step.params, side, shapes, moving.axes[data])
    if isinstance(product, str):
        raise NotAKernel(f"{product}{where}")
    return product


def _bias(program: Program, kernel: Kernel, readers: dict[Atom, list[int]], num_params: int) -> Bias | None:
    """The bias of a kernel, if one product reads the kernel, and nothing but the sum with the bias reads the product."""
    if len(kernel.products) != 1:
        return None
    ((index, layout),) = kernel.products.items()
    (outputs,), behind = program.steps[index].outputs, list[Step]()
    while True:
        if len(readers.get(outputs, ())) != 1 or outputs in program.outputs:
            return None
        (added,) = readers[outputs]
        step = program.steps[added]
        if step.name not in _MOVES or not _keeps_elements(program, step):
            break
        behind.append(step)
        outputs = step.outputs[0]
    if step.name not in ("add", "add_any") or step.inputs[0] == step.inputs[1]:
        return None
    producers = {number: index for index, step in enumerate(program.steps) for number in step.outputs}
    value, chain = step.inputs[1 - step.inputs.index(outputs)], list[int]()
    while value in producers:
        if readers[value] != [chain[-1] if chain else added] or program.steps[producers[value]].name not in _MOVES:
            return None
        chain.append(producers[value])
        value = program.steps[chain[-1]].inputs[0]
    params = program.inputs[:num_params]
    if value not in params or readers[value] != [chain[-1] if chain else added] or value in program.outputs:
        return None
    shape = program.shapes[value].shape
    steps = [program.steps[each] for each in reversed(chain)]
    if not layout.adds_to_outputs(shape, steps, program.shapes[program.steps[index].outputs[0]].shape, behind):
        return None
    return Bias(params.index(value), shape, added, outputs, frozenset(chain))
