"""Runs a traced network with sampled weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree
from bcdl_jax.conversion.kernels import Kernel
from bcdl_jax.conversion.layouts import LookupLayout, ProductLayout
from bcdl_jax.conversion.readings import Address
from bcdl_jax.graph.loops import split_operands
from bcdl_jax.graph.program import Atom, Program, Step
from bcdl_jax.priors.posterior import Posterior


class _Sampled(NamedTuple):
    """The value of a kernel in a sampled run, a pytree. In front of a scan that slices it, all arrays have a leading axis of layers.

    Attributes:
      posterior: The posterior.
      scales: The sampled scales [examples, groups] by the number of examples. All products that read the kernel share them.
    """

    posterior: Posterior
    scales: dict[int, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product with a sampled kernel.

    Attributes:
      layout: The layout of the product.
      noise_key: The key of its noise.
    """

    layout: ProductLayout | LookupLayout
    noise_key: jax.Array


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Runs the steps of a network and of the scans in it.

    Attributes:
      products: The products with sampled kernels, by their addresses.
      unused: The addresses of the steps that move kernels, or compute biases and scales, which the posteriors include.
      passed: The number of the sampled outputs by the address of each step that would shift or scale them.
      scans: The addresses of the scans with any of these steps.
    """

    products: dict[Address, _Product]
    unused: frozenset[Address]
    passed: dict[Address, Atom]
    scans: frozenset[Address]

    def run(
        self, program: Program, arguments: Sequence[Any], around: Address = (), iterations: Sequence[jax.Array] = ()
    ) -> list[Any]:
        """The outputs of the network, or of the body of a scan.

        Args:
          program: The network or the body.
          arguments: Its inputs.
          around: The address of the scan, or () for the network.
          iterations: The number of the current iteration of each scan around the steps.
        """
        values: dict[Atom, Any] = dict(zip(program.inputs, arguments, strict=True)) | program.constant_values()
        for index in sorted(program.live_steps):
            step, address = program.steps[index], (*around, index)
            operands = [values[number] for number in step.inputs]
            if address in self.unused:
                results = operands[:1]
            elif address in self.products:
                dtype = program.shapes[step.outputs[0]].dtype
                results = [_sampled_product(self.products[address], operands, iterations).astype(dtype)]
            elif address in self.passed:
                results = [values[self.passed[address]]]
            elif address in self.scans:
                results = self._scan(step, operands, address, iterations)
            else:
                results = step.bind_at_any_size(*operands)
            values |= dict(zip(step.outputs, results, strict=True))
        return [values[number] for number in program.outputs]

    def _scan(
        self, step: Step, operands: Sequence[Any], address: Address, iterations: Sequence[jax.Array]
    ) -> list[Any]:
        constants, carried, stacks = (operands[part] for part in split_operands(step))

        def iterate(state: tuple[jax.Array, Sequence[Any]], slices: list[Any]) -> Any:
            count, carried = state
            arguments = [*constants, *carried, *slices]
            results = self.run(step.bodies[0], arguments, address, (*iterations, count))
            return (count + 1, results[: len(carried)]), results[len(carried) :]

        start: tuple[jax.Array, Sequence[Any]] = (jnp.zeros((), jnp.uint32), list(carried))
        options = {name: step.params[name] for name in ("length", "reverse", "unroll")}
        (_, carried), stacked = jax.lax.scan(iterate, start, list(stacks), **options)
        return [*carried, *stacked]


def run_sampled(
    program: Program, kernels: dict[int, Kernel], paths: Sequence[str], values: list[Any], key: jax.Array
) -> PyTree:
    """Runs a network with sampled weights.

    Args:
      program: The network.
      kernels: Its kernels, by their number among the inputs.
      paths: The paths of the params, for errors.
      values: The inputs of the program, with a posterior, or one for each layer, in place of each kernel.
      key: A PRNG key.

    Raises:
      ValueError: A kernel has no posterior, but integers.
    """
    values, products, unused, passed = list(values), dict[Address, _Product](), set[Address](), dict[Address, Atom]()
    for place, kernel in kernels.items():
        scale_key, noise_key = jax.random.split(jax.random.fold_in(key, place))
        sizes = {_num_examples(program, address, layout) for address, layout in kernel.products.items()}
        values[place] = _sampled_kernel(values[place], kernel, paths[place], scale_key, sizes)
        for number, (address, layout) in enumerate(kernel.products.items()):
            products[address] = _Product(layout, jax.random.fold_in(noise_key, number) if number else noise_key)
        unused |= kernel.moves
        if kernel.affine is not None:
            unused |= kernel.affine.unused
            passed |= kernel.affine.outputs
    rewritten = [*products, *unused, *passed]
    scans = {address[:depth] for address in rewritten for depth in range(1, len(address))}
    results = _Sampler(products, frozenset(unused), passed, frozenset(scans)).run(program, values)
    return jax.tree.unflatten(program.result_tree, results)


def _sampled_kernel(value: Any, kernel: Kernel, path: str, key: jax.Array, sizes: set[int]) -> _Sampled:
    """The posterior of a kernel with its sampled scales for these numbers of examples."""
    nodes = kernel.nodes(value)
    for node in nodes:
        if not isinstance(node, Posterior):
            raise ValueError(
                f"params holds a {type(node).__name__} at {path}, which has no noise to sample; pass no key."
            )

    def scales(node: Posterior, key: jax.Array) -> dict[int, jax.Array]:
        return {size: node.in_float32().sample_scale(key, size) for size in sizes}

    if kernel.layers is None:
        return _Sampled(value, scales(value, key))
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *nodes)
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(kernel.layers))
    return _Sampled(stacked, jax.vmap(scales)(stacked, keys))


def _num_examples(program: Program, address: Address, layout: ProductLayout | LookupLayout) -> int:
    """The number of examples that a product reads."""
    for index in address[:-1]:
        (program,) = program.steps[index].bodies
    data = program.steps[address[-1]].inputs[layout.data_side]
    return program.shapes[data].shape[layout.example_axis]


def _sampled_product(product: _Product, operands: Sequence[Any], iterations: Sequence[jax.Array]) -> jax.Array:
    """A product with a sampled kernel."""
    layout, key = product.layout, product.noise_key
    kernel, data = operands[1 - layout.data_side], operands[layout.data_side]
    for iteration in iterations:
        key = jax.random.fold_in(key, iteration)
    return layout.sampled(kernel.posterior, data, kernel.scales[data.shape[layout.example_axis]], key)
