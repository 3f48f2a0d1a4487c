"""Finds the arrays of a traced network that can become variational: the kernels of its matrix products and
convolutions, with the biases and batch norms behind them, and the tables of its lookups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bcdl_jax.conversion.affine import Affine, find_affine
from bcdl_jax.conversion.layouts import (
    KernelLayout,
    LookupLayout,
    ProductLayout,
    convolution_layout,
    dot_layout,
    lookup_layout,
)
from bcdl_jax.conversion.readings import Address, Block, CannotFollow, Reading, readings
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.products import PRODUCTS
from bcdl_jax.graph.program import Program, data_dependent


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An array of the params that becomes the kernel of a variational layer, or of one layer for each slice of it.

    A table whose rows the network looks up counts as a kernel, too.

    Attributes:
      layout: The relation between the array, or a slice of it, and the kernel [*window, in / feature groups, out] of a posterior.
      products: The layout of each product or lookup that reads the array, by its address.
      moves: The addresses of the steps that only move the array towards its products.
      slices: The address of the scan that reads one slice of the array in each iteration, or None.
      layers: The number of slices, or None if the array is one kernel.
      affine: The steps that shift and scale the outputs, such as a bias or a batch norm, or None.
    """

    layout: KernelLayout
    products: dict[Address, ProductLayout | LookupLayout]
    moves: frozenset[Address]
    slices: Address | None = None
    layers: int | None = None
    affine: Affine | None = None

    def nodes(self, value: Any) -> Sequence[Any]:
        """The nodes of all layers, from the node or the tuple of nodes that stands for the array in the params."""
        return [value] if self.layers is None else value

    @property
    def groups_of(self) -> Literal["inputs", "output channels", "columns"]:
        """The kind of the groups."""
        if any(isinstance(layout, LookupLayout) for layout in self.products.values()):
            return "columns"
        return "inputs" if self.layout.canonical.group_axis == "input" else "output channels"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a network.

    Attributes:
      found: The kernels, by the number of the array in the order of ``jax.tree.leaves(params)``.
      reasons: The reason for each array that is no kernel, by its number: a clause such as "it is read by add".
    """

    found: dict[int, Kernel]
    reasons: dict[int, str]


def find_kernels(program: Program, moving: Moving, num_params: int) -> Kernels:
    """Finds the arrays of the params that reach only products with data, by steps that only move or cast their elements.

    Args:
      program: A network, whose first inputs are the params.
      moving: The parts of the program that depend on the batch size.
      num_params: The number of arrays of the params.
    """
    network = Block(program, moving, frozenset(data_dependent(program, num_params)))
    found, reasons = dict[int, Kernel](), dict[int, str]()
    read = dict[int, list[Reading]]()
    for place, number in enumerate(program.inputs[:num_params]):
        try:
            read[place] = readings(network, number)
            found[place] = _kernel(program.shapes[number], read[place])
        except CannotFollow as reason:
            reasons[place] = str(reason)
    sources = {
        (reading.block.address, reading.value): (place, reading)
        for place, each in read.items()
        if place in reasons and len(each) == 1
        for reading in each
    }
    for place, kernel in found.items():
        if len(kernel.products) == 1:
            (reading,), (layout,) = read[place], kernel.products.values()
            if isinstance(layout, ProductLayout):
                affine = find_affine(reading.block, reading.index, layout, kernel.slices, sources)
                found[place] = dataclasses.replace(kernel, affine=affine)
    return Kernels(found, reasons)


def _kernel(struct: jax.ShapeDtypeStruct, read: Sequence[Reading]) -> Kernel:
    """The kernel at a param with these readings."""
    shape, dtype = struct.shape, struct.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CannotFollow(f"it has the type {dtype}")
    if not read:
        raise CannotFollow("nothing reads it")
    if len({reading.slices for reading in read}) > 1:
        raise CannotFollow("it is read both as a whole and by slices, or by the slices of several scans")
    slices = read[0].slices
    shape, layers = (shape, None) if slices is None else (shape[1:], shape[0])
    products = {reading.address: _product(reading) for reading in read}
    layouts = [KernelLayout(shape, each.chain, products[each.address].canonical) for each in read]
    if not all(layout.is_equal(layouts[0]) for layout in layouts):
        raise CannotFollow("its products read it in different layouts")
    moves = frozenset(address for reading in read for address in reading.moves)
    return Kernel(layouts[0], products, moves, slices, layers)


def _product(reading: Reading) -> ProductLayout | LookupLayout:
    """The layout of the product or lookup that reads a kernel."""
    step, block = reading.step, reading.block
    where = f" at {step.scope}" if step.scope else ""
    if step.name not in PRODUCTS and (step.name != "gather" or step.inputs[0] != reading.value):
        raise CannotFollow(f"it is read by {step.name}{where}")
    side = step.inputs.index(reading.value)
    data = step.inputs[1 - side]
    if data not in block.depends or data == reading.value:
        raise CannotFollow(f"its {'lookup' if step.name == 'gather' else 'product'}{where} reads no data")
    shapes: Sequence[tuple[int, ...]] = [block.program.shapes[number].shape for number in step.inputs]
    product: ProductLayout | LookupLayout | str
    if step.name == "gather":
        product = lookup_layout(step, shapes[0], shapes[1], block.moving.axes[data])
    else:
        make = dot_layout if step.name == "dot_general" else convolution_layout
        product = make(step.params, side, shapes, block.moving.axes[data])
    if isinstance(product, str):
        raise CannotFollow(f"{product}{where}")
    return product
