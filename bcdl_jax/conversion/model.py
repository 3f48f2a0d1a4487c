"""Any JAX function of a tree of params as a variational network."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, check_arrays, named_arrays
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.plain_twin import check_finite, with_mean_weights
from bcdl_jax.conversion.kernels import Kernel, Kernels, find_kernels
from bcdl_jax.conversion.plan import ConversionPlan, LeafPlan
from bcdl_jax.conversion.sampling import run_sampled
from bcdl_jax.conversion.useless import UselessUnits
from bcdl_jax.graph.batch_size import TracedNetwork, trace_for_any_batch
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.graph.matching import same_constant
from bcdl_jax.graph.program import dtype_of
from bcdl_jax.graph.tracing import trace
from bcdl_jax.priors.balancing import balance_scales
from bcdl_jax.priors.family import Family
from bcdl_jax.priors.kl import kl_divergence
from bcdl_jax.priors.normal_jeffreys import GroupNormalJeffreys
from bcdl_jax.priors.posterior import GroupAxis, Posterior


@dataclasses.dataclass(frozen=True)
class VariationalModel:
    """A network whose kernels have posteriors, the result of ``variational``.

    Attributes:
      params: The params that training starts from: the given tree, with a ``Posterior`` in place of each converted kernel, a tuple of them in
        place of the stacked kernels of the layers in a scan, and None in place of biases and batch norms, which the posterior of the kernel
        before them holds.
      plan: The plan of the conversion, to print.
    """

    params: PyTree
    plan: ConversionPlan
    _apply: Callable[..., PyTree]
    _network: TracedNetwork
    _kernels: Kernels
    _fixed: dict[int, jax.Array]
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
        paths = [leaf.path for leaf in self.plan.leaves]
        return run_sampled(program, self._kernels.found, paths, [*nodes, *jax.tree.leaves(inputs)], key)

    def sample(self, params: PyTree, *inputs_and_key: PyTree) -> PyTree:
        """Runs the network with sampled weights. The key is the last argument, as ``predict`` and ``shrink`` need it.

        Args:
          params: The params, see ``apply``.
          *inputs_and_key: The inputs of the network, and a PRNG key behind them.
        """
        *inputs, key = inputs_and_key
        return self.apply(params, *inputs, key=key)

    def mean_params(self, params: PyTree) -> PyTree:
        """The params of the given network: the mean or rounded weights in place of each node, exactly zero where pruned.

        Args:
          params: A tree like ``self.params``.
        """
        return self._unflatten(self._nodes(params))

    def prune_useless(self, params: PyTree) -> PyTree:
        """Masks all inputs and outputs that are useless because other groups are pruned.

        An input is useless if its data are always 0, or if it has no weight that a result of the network depends on. An output is useless if no
        result depends on it, or if it is always 0. The masks are found in the traced network, across norms, skips, branches, concatenations,
        flattens and scans. They change no output of the network, at the means or sampled. An output of which only the bias is left is a
        constant, and is kept. Zeros of arrays that stay plain do not count, since training may change them.

        Args:
          params: A tree like ``self.params``.

        Returns:
          A tree of the same structure. Quantised layers stay unchanged.

        Raises:
          ValueError: ``params`` has another structure or shapes than ``self.params``, or this function is called within ``jax.jit``.
        """
        nodes = self._nodes(params)
        layers = {place: list(kernel.nodes(nodes[place])) for place, kernel in self._kernels.found.items()}
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(layers)):
            raise ValueError(
                "params is traced, but prune_useless reads the masks of its layers; call it outside of jax.jit and jax.vmap."
            )
        for place, masked in self._useless_units.masked(layers).items():
            nodes[place] = masked[0] if self._kernels.found[place].layers is None else type(nodes[place])(masked)
        return jax.tree.unflatten(self._structure, nodes)

    @functools.cached_property
    def _useless_units(self) -> UselessUnits:
        return UselessUnits(self._network.program, self._network.moving, self._kernels.found, len(self._leaves))

    def _nodes(self, params: PyTree) -> list[Any]:
        """The node or array in place of each array of the given network."""
        try:
            nodes = self._structure.flatten_up_to(params)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"params has another structure than the params of the converted network: {error}"
            ) from error
        for place, kernel in self._kernels.found.items():
            path, value = self.plan.leaves[place].path, nodes[place]
            if kernel.layers is not None and not (isinstance(value, tuple | list) and len(value) == kernel.layers):
                raise ValueError(
                    f"params holds {type(value).__name__} at {path}; it must hold a tuple of {kernel.layers} posteriors or quantised layers."
                )
            for node in kernel.nodes(value):
                _check_node(path, node, kernel)
        return nodes

    def _unflatten(self, nodes: list[Any]) -> PyTree:
        arrays = list(nodes)
        for place, kernel in self._kernels.found.items():
            weights, biases = zip(*(node.mean_weights() for node in kernel.nodes(nodes[place])), strict=True)
            arrays[place] = _whole(kernel, [kernel.layout.to_array(each) for each in weights])
            if kernel.affine is not None:
                fixed = [_slices(kernel, self._fixed[each]) for each in kernel.affine.fixed]
                unfolded = [
                    kernel.affine.unfolded(bias, dict(zip(kernel.affine.fixed, values, strict=True)))
                    for bias, *values in zip(biases, *fixed, strict=True)
                ]
                for each in kernel.affine.shapes:
                    whole = _whole(kernel, [arrays_of_layer[each] for arrays_of_layer in unfolded])
                    arrays[each] = whole.astype(self._leaves[each].dtype)
        return jax.tree.unflatten(self._structure, arrays)


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
    Its groups are the inputs of a matrix product, or the output channels of a convolution. A table whose rows the network looks up, such as
    an embedding, becomes variational, too; its groups are its columns. A bias, or a batch norm with running averages, behind the product belongs
    to the same posterior.
    This holds within ``jax.lax.scan``, too: a recurrent cell has one posterior for all times, stacked layers have one for each layer. All
    other arrays stay plain, and the plan gives the reason. At its means, the variational network computes the same outputs as the given
    network.

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
      ValueError: A pattern of ``rules`` matches no path, no array can become variational, a converted array has values that are not finite, or
        ``apply`` depends on Python state or uses values of arrays in Python.
    """
    check_arrays(params)
    inputs = as_inputs(example_inputs)
    leaves, structure = jax.tree.flatten(params)
    paths = [name for name, _ in named_arrays(params)]
    families = _families(paths, GroupNormalJeffreys() if prior is None else prior, rules or {})
    network = trace_for_any_batch(apply, params, inputs)
    _check_is_pure(apply, params, inputs)
    kernels = _chosen(find_kernels(network.program, network.moving, len(leaves)), families, leaves)
    if not kernels.found:
        reasons = "; ".join(f"{path}: {kernels.reasons[place]}" for place, path in enumerate(paths))
        raise ValueError(f"No array of params can become variational. {reasons or 'It holds no arrays'}.")
    held = {each: place for place, kernel in kernels.found.items() if kernel.affine for each in kernel.affine.shapes}
    for place in [*kernels.found, *held]:
        check_finite(paths[place], leaves[place], dtype_of(leaves[place]), "params")
    nodes, kl = _start_posteriors(kernels, families, leaves)
    plan = ConversionPlan(
        tuple(
            _planned(
                path,
                jnp.shape(leaf),
                nodes.get(place),
                families[place],
                kernels.found.get(place),
                kernels.reasons.get(place),
                paths[held[place]] if place in held else None,
            )
            for place, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        ),
        kl,
        None if network.limit is None else f"With a key, ``apply`` {network.limit}",
    )
    structs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), dtype_of(leaf)) for leaf in leaves)
    start = [None if place in held else nodes.get(place, leaf) for place, leaf in enumerate(leaves)]
    affines = [kernel.affine for kernel in kernels.found.values() if kernel.affine is not None]
    fixed = {place: jnp.asarray(leaves[place]) for affine in affines for place in affine.fixed}
    start_params = jax.tree.unflatten(structure, start)
    return VariationalModel(start_params, plan, apply, network, kernels, fixed, structs, structure)


def _check_is_pure(apply: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]) -> None:
    """Raises ValueError if two traces of the network differ."""
    # A new function each time, since JAX does not trace the same one again.
    first, second = (trace(lambda *arguments: apply(*arguments), params, *inputs) for _ in range(2))
    constants = all(same_constant(value, second.constants[number]) for number, value in first.constants.items())
    if first.signature() != second.signature() or not constants:
        raise ValueError(
            "apply computes something else at each call with the same arguments; it must depend on its arguments alone, not on Python state. "
            "Random numbers must come from a key among the inputs."
        )


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


def _chosen(kernels: Kernels, families: list[Family | None], leaves: list[Any]) -> Kernels:
    """The kernels without those that a rule leaves plain, and without scales that cannot be undone."""
    plain = [place for place in kernels.found if families[place] is None]
    candidates = {place: kernel for place, kernel in kernels.found.items() if place not in plain}
    can_fold = _can_fold(candidates, families, leaves)
    found = {
        place: kernel if can_fold.get(place) else dataclasses.replace(kernel, affine=None)
        for place, kernel in candidates.items()
    }
    reasons = kernels.reasons | {
        place: "rules leaves it plain" for place, family in enumerate(families) if family is None
    }
    return Kernels(found, reasons)


def _check_node(path: str, node: Any, kernel: Kernel) -> None:
    if not is_layer(node):
        raise ValueError(
            f"params holds {type(node).__name__} at {path}; it must hold a posterior or a quantised layer."
        )
    shape, expected = node.kernel_shape, kernel.layout.canonical.shape
    if shape != expected:
        raise ValueError(
            f"The kernel at {path} has shape {shape}; it must have {expected}. Apply the params of many seeds "
            "with jax.vmap. The small function of shrink takes the params of a shrunk network."
        )


def _can_fold(kernels: Mapping[int, Kernel], families: list[Family | None], leaves: list[Any]) -> dict[int, bool]:
    """Whether no rule leaves an array of the steps behind a kernel plain, and the scale can be undone in every layer.

    The result holds the kernels with such steps.
    """
    affines = {place: kernel.affine for place, kernel in kernels.items() if kernel.affine is not None}
    allowed = {
        place: affine for place, affine in affines.items() if all(families[each] is not None for each in affine.shapes)
    }

    def can_unfold(arrays: list[jax.Array]) -> dict[int, list[jax.Array]]:
        return {
            place: [affine.can_unfold(layer) for layer in _behind(kernels[place], arrays)]
            for place, affine in allowed.items()
        }

    arrays = [jnp.asarray(leaf) for leaf in leaves]
    found = jax.device_get(jax.jit(can_unfold, compiler_options=_quick_options())(arrays))
    return {place: all(map(bool, found.get(place, [False]))) for place in affines}


def _start_posteriors(
    kernels: Kernels, families: list[Family | None], leaves: list[Any]
) -> tuple[dict[int, Any], float]:
    """The posteriors that training starts from, by the number of the array: one, or a tuple of one for each layer.

    Their means are the given arrays.

    Returns:
      The posteriors, and the sum of their KL divergences.
    """

    def folded(arrays: list[jax.Array]) -> dict[int, list[tuple[jax.Array, jax.Array | None]]]:
        return {
            place: [
                _folded(kernel, *layer)
                for layer in zip(_slices(kernel, arrays[place]), _behind(kernel, arrays), strict=True)
            ]
            for place, kernel in kernels.found.items()
        }

    arrays = [jnp.asarray(leaf) for leaf in leaves]
    means = jax.jit(folded, compiler_options=_quick_options())(arrays)
    nodes, total = dict[int, Any](), 0.0
    # Layers of one shape share a program: XLA takes longer for a start than for all the rest of the conversion.
    starts = dict[tuple[Any, ...], Callable[..., tuple[Posterior, jax.Array]]]()
    for place, kernel in kernels.found.items():
        family, canonical = families[place], kernel.layout.canonical
        assert family is not None
        form = id(family), canonical.group_axis, canonical.feature_groups
        if form not in starts:
            start = functools.partial(_start_posterior, family, canonical.group_axis, canonical.feature_groups)
            starts[form] = jax.jit(start, compiler_options=_quick_options())
        each = [starts[form](place, layer, *kernel_and_bias) for layer, kernel_and_bias in enumerate(means[place])]
        nodes[place] = each[0][0] if kernel.layers is None else tuple(node for node, _ in each)
        total += sum(float(kl) for _, kl in each)
    return nodes, total


@functools.cache
def _quick_options() -> dict[str, Any]:
    """Options of XLA with which it compiles quickly. It refuses options that it does not know."""
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    # The newer code generator for the CPU takes twice as long.
    quicker = quick | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=quicker)()
    except jax.errors.JaxRuntimeError:
        return quick
    return quicker


def _behind(kernel: Kernel, arrays: Sequence[jax.Array]) -> list[dict[int, jax.Array]]:
    """The arrays of the steps behind each layer of a kernel, by their number."""
    held = {} if kernel.affine is None else {place: _slices(kernel, arrays[place]) for place in kernel.affine.shapes}
    return [{place: slices[layer] for place, slices in held.items()} for layer in range(kernel.layers or 1)]


def _slices(kernel: Kernel, array: jax.Array) -> Sequence[jax.Array]:
    """The arrays of all layers of a kernel."""
    return [array] if kernel.layers is None else [array[layer] for layer in range(kernel.layers)]


def _whole(kernel: Kernel, slices: Sequence[jax.Array]) -> jax.Array:
    """The array of which all layers of a kernel have these slices, the inverse of ``_slices``."""
    return slices[0] if kernel.layers is None else jnp.stack(slices)


def _folded(kernel: Kernel, array: jax.Array, behind: dict[int, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """The weights and the bias of a layer that do the work of its array and of the steps behind the product."""
    weights = kernel.layout.to_kernel(array)
    return (weights, None) if kernel.affine is None else kernel.affine.folded(weights, behind)


def _start_posterior(
    family: Family,
    group_axis: GroupAxis,
    feature_groups: int,
    place: jax.Array,
    layer: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
) -> tuple[Posterior, jax.Array]:
    """The posterior with these mean weights that training starts from, and its KL divergence."""
    key = jax.random.fold_in(jax.random.key(place), layer)
    node = with_mean_weights(family.create(key, weights, bias, group_axis, feature_groups), weights, bias)
    balanced = balance_scales(node)
    return balanced, kl_divergence(balanced)


def _planned(
    path: str,
    shape: tuple[int, ...],
    start: Any,
    family: Family | None,
    kernel: Kernel | None,
    reason: str | None,
    held_by: str | None,
) -> LeafPlan:
    if held_by is not None:
        return LeafPlan(path, shape, held_by=held_by)
    if kernel is None:
        return LeafPlan(path, shape, reason=reason)
    groups = sum(node.group_mask.size for node in kernel.nodes(start))
    return LeafPlan(path, shape, type(family).__name__, groups, kernel.groups_of)
