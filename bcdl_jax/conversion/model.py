"""Any JAX function of a tree of params as a variational network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, check_arrays, named_arrays
from bcdl_jax.compression.plain_twin import check_finite, with_mean_weights
from bcdl_jax.conversion.kernels import Kernels, find_kernels
from bcdl_jax.conversion.layouts import ProductLayout
from bcdl_jax.conversion.plan import ConversionPlan, LeafPlan
from bcdl_jax.graph.program import Program, compile_quickly, dtype_of
from bcdl_jax.graph.tracing import trace
from bcdl_jax.nn.sampling import sample_outputs
from bcdl_jax.priors.balancing import balance_scales
from bcdl_jax.priors.family import Family
from bcdl_jax.priors.kl import kl_divergence
from bcdl_jax.priors.normal_jeffreys import GroupNormalJeffreys
from bcdl_jax.priors.posterior import Posterior
from bcdl_jax.shrinking.batch_size import TracedNetwork, trace_for_any_batch


@dataclasses.dataclass(frozen=True)
class VariationalModel:
    """A network whose kernels have posteriors, the result of ``variational``.

    Attributes:
      params: The params that training starts from: the given tree, with a ``Posterior`` in place of each converted kernel, and None in place
        of a bias, which the posterior of its kernel holds.
      plan: The plan of the conversion, to print.
    """

    params: PyTree
    plan: ConversionPlan
    _apply: Callable[..., PyTree]
    _network: TracedNetwork
    _kernels: Kernels
    _leaves: tuple[jax.ShapeDtypeStruct, ...]
    _structure: Any

    def apply(self, params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> PyTree:
        """Runs the network.

        Args:
          params: A tree like ``self.params``: trained, pruned, or with quantised layers of ``reduce_precision``.
          *inputs: The inputs of the network.
          key: A PRNG key to sample the weights, or None for their means. The noise of an example depends on the key and on its place in the
            batch alone.

        Returns:
          The outputs of the network.

        Raises:
          ValueError: ``params`` has another structure or shapes than ``self.params``, or holds no posterior to sample from, or the network
            runs other operations at this batch size.
        """
        nodes = self._nodes(params)
        if key is None:
            return self._apply(self._unflatten(nodes), *inputs)
        structs = jax.tree.unflatten(self._structure, self._leaves)
        program = self._network.program_at(trace(self._apply, structs, *inputs))
        if program is None:
            shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(inputs))
            raise ValueError(
                f"The inputs have the shapes {shapes}. The converted network cannot sample there: the given network runs other operations "
                "than for the example inputs."
            )
        return self._sampled(program, nodes, jax.tree.leaves(inputs), key)

    def mean_params(self, params: PyTree) -> PyTree:
        """The params of the given network: the mean or rounded weights in place of each node, exactly zero where pruned.

        Args:
          params: A tree like ``self.params``.
        """
        return self._unflatten(self._nodes(params))

    def _nodes(self, params: PyTree) -> list[Any]:
        """The node or array in place of each array of the given network."""
        try:
            nodes = self._structure.flatten_up_to(params)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"params has another structure than the params of the converted network: {error}"
            ) from error
        for place, kernel in self._kernels.found.items():
            shape, expected = getattr(nodes[place], "kernel_shape", None), kernel.layout.canonical.shape
            if shape is None:
                raise ValueError(
                    f"params holds {type(nodes[place]).__name__} at {self.plan.leaves[place].path}; it must hold a posterior or a quantised layer."
                )
            if shape != expected:
                raise ValueError(
                    f"The kernel at {self.plan.leaves[place].path} has shape {shape}; it must have {expected}. Apply the params of many seeds "
                    "with jax.vmap. The small function of shrink takes the params of a shrunk network."
                )
        return nodes

    def _unflatten(self, nodes: list[Any]) -> PyTree:
        arrays = list(nodes)
        for place, kernel in self._kernels.found.items():
            weights, bias = nodes[place].mean_weights()
            arrays[place] = kernel.layout.to_array(weights)
            if kernel.bias is not None:
                arrays[kernel.bias.place] = bias.reshape(kernel.bias.shape)
        return jax.tree.unflatten(self._structure, arrays)

    def _sampled(self, program: Program, nodes: list[Any], inputs: list[Any], key: jax.Array) -> PyTree:
        kernels = self._kernels.found.items()
        products = {
            index: (place, number, layout)
            for place, kernel in kernels
            for number, (index, layout) in enumerate(kernel.products.items())
        }
        done = set[int]()
        for _, kernel in kernels:
            done |= kernel.moved if kernel.bias is None else kernel.moved | kernel.bias.moved
        sums = {kernel.bias.step: kernel.bias.outputs for _, kernel in kernels if kernel.bias is not None}
        values: dict[int, Any] = dict(zip(program.inputs, [*nodes, *inputs], strict=True)) | program.constant_values()
        for index, step in enumerate(program.steps):
            if index in done:
                continue
            if index in products:
                place, number, layout = products[index]
                path = self.plan.leaves[place].path
                data = values[step.inputs[layout.data_side]]
                outputs = _sampled_product(nodes[place], path, layout, data, jax.random.fold_in(key, place), number)
                values[step.outputs[0]] = outputs.astype(program.shapes[step.outputs[0]].dtype)
            elif index in sums:  # The sampled outputs include the bias.
                values[step.outputs[0]] = values[sums[index]]
            else:
                results = step.bind_at_any_size(*(values[number] for number in step.inputs))
                values |= dict(zip(step.outputs, results, strict=True))
        return jax.tree.unflatten(program.result_tree, [values[number] for number in program.outputs])


def _sampled_product(
    node: Any, path: str, layout: ProductLayout, data: jax.Array, key: jax.Array, number: int
) -> jax.Array:
    """A product with a sampled kernel.

    Args:
      node: The posterior of the kernel.
      path: Its path, for errors.
      layout: The layout of the product.
      data: The other operand.
      key: The key of the kernel.
      number: The place of the product among those that read the kernel. They share the scales of each example.
    """
    if not isinstance(node, Posterior):
        raise ValueError(f"params holds a {type(node).__name__} at {path}, which has no noise to sample; pass no key.")
    scale_key, noise_key = jax.random.split(key)
    if number:
        noise_key = jax.random.fold_in(noise_key, number)
    return layout.to_result(sample_outputs(node, layout.to_inputs(data), scale_key, noise_key, layout.linear_map))


def variational(
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    prior: Family | None = None,
    rules: Mapping[str, Family | None] | None = None,
) -> VariationalModel:
    """Makes a network variational without changing its code.

    The function is traced. Each array of ``params`` that only matrix products or convolutions with data read becomes the mean of a posterior.
    Its groups are the inputs of a matrix product, or the output channels of a convolution. A bias that is added to the outputs belongs to
    the same posterior. All other arrays stay plain, and the plan says why. At its means, the variational network computes the same outputs as the given network.

    The scales are balanced, see ``balance_scales``. The log-variances start near -9.

    Args:
      apply: The network: any JAX function ``apply(params, *inputs)``. For Linen: ``model.apply``, and its variables as ``params``.
      params: The trained params, a tree of finite arrays.
      example_inputs: The inputs: a tuple, or a single array. Their leading axis is the batch. Only shapes and dtypes matter.
      prior: The family of all converted arrays. The default is ``GroupNormalJeffreys()``.
      rules: Families by regular expressions, which ``re.search`` looks for in the paths of the arrays; None to leave an array plain. The first
        pattern that matches a path counts.

    Returns:
      The variational network, with its start params and its plan.

    Raises:
      ValueError: A pattern of ``rules`` matches no path, no array can become variational, or a converted array has values that are not finite.
    """
    check_arrays(params)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves, structure = jax.tree.flatten(params)
    paths = [name for name, _ in named_arrays(params)]
    families = _families(paths, GroupNormalJeffreys() if prior is None else prior, rules or {})
    network = trace_for_any_batch(apply, params, inputs)
    kernels = _chosen(find_kernels(network.program, network.moving, len(leaves)), families)
    if not kernels.found:
        reasons = "; ".join(f"{path}: {kernels.reasons[place]}" for place, path in enumerate(paths))
        raise ValueError(f"No array of params can become variational. {reasons or 'It holds no arrays'}.")
    biases = {kernel.bias.place: place for place, kernel in kernels.found.items() if kernel.bias is not None}
    for place in [*kernels.found, *biases]:
        check_finite(paths[place], leaves[place], dtype_of(leaves[place]), "params")
    nodes = _start_posteriors(kernels, families, leaves)
    plan = ConversionPlan(
        tuple(
            _planned(
                path,
                jnp.shape(leaf),
                nodes.get(place),
                kernels.reasons.get(place),
                paths[biases[place]] if place in biases else None,
            )
            for place, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        ),
        float(kl_divergence(nodes)),
        None if network.larger else "It samples for the batch size of the example inputs alone.",
    )
    structs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), dtype_of(leaf)) for leaf in leaves)
    start = [None if place in biases else nodes.get(place, leaf) for place, leaf in enumerate(leaves)]
    return VariationalModel(jax.tree.unflatten(structure, start), plan, apply, network, kernels, structs, structure)


def _families(paths: list[str], prior: Family, rules: Mapping[str, Family | None]) -> list[Family | None]:
    """The family for each path."""
    for pattern, family in rules.items():
        if family is not None and not isinstance(family, Family):
            raise ValueError(f"rules[{pattern!r}] is a {type(family).__name__}; it must be a Family or None.")
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"The pattern {pattern!r} of rules matches no array; params holds {', '.join(paths)}.")

    def family_of(path: str) -> Family | None:
        return next((family for pattern, family in rules.items() if re.search(pattern, path)), prior)

    return [family_of(path) for path in paths]


def _chosen(kernels: Kernels, families: list[Family | None]) -> Kernels:
    """The kernels without those that a rule leaves plain."""
    plain = [place for place in kernels.found if families[place] is None]
    found = {
        place: kernel
        if kernel.bias is None or families[kernel.bias.place] is not None
        else dataclasses.replace(kernel, bias=None)
        for place, kernel in kernels.found.items()
        if place not in plain
    }
    reasons = kernels.reasons | {place: "a rule says so" for place, family in enumerate(families) if family is None}
    return Kernels(found, reasons)


def _start_posteriors(kernels: Kernels, families: list[Family | None], leaves: list[Any]) -> dict[int, Posterior]:
    """The posteriors that training starts from, by the number of the array. Their means are the given arrays."""

    def start(arrays: list[jax.Array]) -> dict[int, Posterior]:
        nodes = {}
        for place, kernel in kernels.found.items():
            family, canonical = families[place], kernel.layout.canonical
            assert family is not None
            means = kernel.layout.to_kernel(arrays[place])
            bias = None if kernel.bias is None else arrays[kernel.bias.place].reshape(-1)
            node = family.create(jax.random.key(place), means, bias, canonical.group_axis, canonical.feature_groups)
            nodes[place] = with_mean_weights(node, means, bias)
        return balance_scales(nodes)

    arrays = [jnp.asarray(leaf) for leaf in leaves]
    return compile_quickly(start, arrays)(arrays)


def _planned(
    path: str, shape: tuple[int, ...], node: Posterior | None, reason: str | None, bias_of: str | None
) -> LeafPlan:
    if bias_of is not None:
        return LeafPlan(path, shape, bias_of=bias_of)
    if node is None:
        return LeafPlan(path, shape, reason=reason)
    family = type(node).__name__.removesuffix("Posterior")
    return LeafPlan(path, shape, family, node.group_mask.size, node.group_axis)
