"""The approximate posterior of one layer: a typed pytree node inside the params tree.

Every transform of this library (KL divergence, pruning, precision, rates) finds the variational layers of a params tree by the type of
this node, never by matching names.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

PyTree = Any
GroupAxis = Literal["input", "output"]
T = TypeVar("T")

START_LOG_VARIANCE = -9.0
_START_SPREAD = 0.01


class WeightsNode(Protocol):
    """What a layer needs of the node it finds in the params tree to compute its mean: a posterior, or a quantised layer."""

    @property
    def kernel_shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> jnp.dtype: ...

    @property
    def input_mask(self) -> jax.Array: ...

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]: ...


@flax.struct.dataclass
class Posterior(abc.ABC):
    """q(w, z) of one layer: Gaussian weights, one scale z per group of weights, and the masks of what has been pruned.

    What pruning takes away one by one are the groups, unless the family says otherwise (``prunes_weights``).

    A group is one input unit of a dense layer (``group_axis="input"``: the rows of the kernel) or one output channel of a convolution
    (``group_axis="output"``: the kernels and the bias of that channel). The weight that the layer uses is kernel * z.

    Subclasses add the parameters of q(z) and say what their family says: see the abstract methods.

    Attributes:
      kernel_mean: [*window, in / feature groups, out]; the window is empty for a dense layer.
      kernel_log_variance: same shape, natural logarithm of the variance.
      bias_mean: [out], or None for a layer without bias.
      bias_log_variance: [out], or None.
      input_mask: [in]; an input whose entry is not positive is pruned. A leaf, so that it can be batched and sharded like the rest;
        its gradient is zero.
      output_mask: [out]; likewise for outputs.
      group_axis: which of the two masks is the mask of this layer's own groups.
    """

    kernel_mean: jax.Array
    kernel_log_variance: jax.Array
    bias_mean: jax.Array | None
    bias_log_variance: jax.Array | None
    input_mask: jax.Array
    output_mask: jax.Array
    group_axis: GroupAxis = flax.struct.field(pytree_node=False)

    # Whether the family prunes single weights: then each kept one is stored with its index.
    prunes_weights = False

    # What a family says.

    @property
    @abc.abstractmethod
    def default_threshold(self) -> float:
        """A log dropout rate above which a group carries next to nothing: for progress reports, not for the final choice."""

    @abc.abstractmethod
    def kl_divergence(self) -> jax.Array:
        """KL(q || prior) in nats of everything that is not pruned: a scalar."""

    @abc.abstractmethod
    def log_dropout_rate(self) -> jax.Array:
        """The pruning score of each unit, of the shape of ``unit_mask``; a unit is kept while its score is below a threshold."""

    @abc.abstractmethod
    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of z, each [groups]."""

    @abc.abstractmethod
    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        """One draw of z per example: [num_examples, groups]. The draw of example i depends on the key and on i alone."""

    @abc.abstractmethod
    def clip_variances(self) -> Self:
        """The same posterior with the variances of weights and biases brought down to the largest value the family allows."""

    # What holds for every family whose units are its groups.

    @property
    def unit_mask(self) -> jax.Array:
        """The mask of what is pruned one by one: of the groups, [groups], or of the weights, of the kernel's shape."""
        return self.group_mask

    def group_scores(self) -> jax.Array:
        """[groups]: the pruning score of each group, for pictures."""
        return self.log_dropout_rate()

    def log_noise_to_signal(self) -> jax.Array:
        """log(sum of Var[w] / sum of E[w]^2) over the weights in use of each unit, of the shape of ``unit_mask``; 1e9 without a signal.

        Unlike a log dropout rate it counts the noise of the weights with that of the scale, and does not depend on how the magnitude is
        shared between the two.
        """
        # In float32 at least, moments and sums too: ties would be pruned together.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        mean, variance = jax.tree.map(lambda leaf: leaf.astype(wide), self).kernel_moments()
        own = mean.ndim - (2 if self.group_axis == "input" else 1)
        others = tuple(axis for axis in range(mean.ndim) if axis != own)
        return log_ratio(jnp.sum(variance, others), jnp.sum(mean**2, others))

    def sampled_moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of the kernel without its scales, as it is sampled."""
        return self.kernel_mean, jnp.exp(self.kernel_log_variance)

    def prune_units(self, keep: jax.Array) -> Self:
        """The same posterior without the units that are not in ``keep``, bools of the shape of ``unit_mask``."""
        side = "input_mask" if self.group_axis == "input" else "output_mask"
        return self.replace(**{side: self.group_mask * keep.astype(self.group_mask.dtype)})  # type: ignore[attr-defined]

    def inputs_read_by(self, outputs: jax.Array) -> jax.Array:
        """[in] of bool: the inputs that any of the kept ``outputs``, [out] of bool, reads."""
        return jnp.broadcast_to(jnp.any(outputs), self.input_mask.shape)

    def with_masks(self, inputs: jax.Array, outputs: jax.Array) -> Self:
        """The same posterior with these masks of its inputs and outputs, [in] and [out] of bool."""
        dtype = self.input_mask.dtype
        return self.replace(input_mask=inputs.astype(dtype), output_mask=outputs.astype(dtype))  # type: ignore[attr-defined]

    def with_scales_times(self, factor: jax.Array) -> Self:
        """The same distribution of the weights in use, with every z ``factor`` [groups] times as large; itself if there are no scales."""
        return self

    # What follows from it for every family.

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.kernel_mean.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel_mean.dtype

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Posterior means of the kernel and the bias in use, exactly zero where pruned; the bias is None where there is none."""
        bias = self.bias_moments()
        return self.kernel_moments()[0], None if bias is None else bias[0]

    @property
    def group_mask(self) -> jax.Array:
        """[groups]: the mask of this layer's own groups."""
        return self.input_mask if self.group_axis == "input" else self.output_mask

    @property
    def kernel_mask(self) -> jax.Array:
        """Bools that broadcast against the kernel: its entries that are not pruned."""
        return kernel_mask(self.kernel_shape, self.input_mask, self.output_mask)

    def spread_over_kernel(self, per_group: jax.Array) -> jax.Array:
        """Shapes an array [groups] so that it broadcasts against the kernel."""
        return per_group[:, None] if self.group_axis == "input" else per_group

    def kept_weights(self) -> jax.Array:
        """How many entries of the kernel are not pruned: a scalar, float32, since there may be more than an int32 can count."""
        mask = self.kernel_mask
        return jnp.sum(mask, dtype=jnp.float32) * (math.prod(self.kernel_shape) // mask.size if mask.size else 0)

    def kernel_moments(self) -> tuple[jax.Array, jax.Array]:
        """Posterior mean and variance of the weights in use, kernel * z, each of the kernel's shape, exactly zero where pruned.

        With w and z independent: E[wz] = E[w] E[z] and Var[wz] = E[z]^2 Var[w] + Var[z] (E[w]^2 + Var[w]).
        """
        scale_mean, scale_variance = map(self.spread_over_kernel, self.scale_moments())
        return _product_moments(
            self.kernel_mean, self.kernel_log_variance, scale_mean, scale_variance, self.kernel_mask
        )

    def bias_moments(self) -> tuple[jax.Array, jax.Array] | None:
        """Posterior mean and variance of the biases in use, each [out], zero where pruned; None without a bias.

        The bias of an output group shares the group's z; the bias of a layer with input groups has none.
        """
        if self.bias_mean is None or self.bias_log_variance is None:
            return None
        scale_mean, scale_variance = self.scale_moments()
        if self.group_axis == "input":
            scale_mean, scale_variance = jnp.ones((), scale_mean.dtype), jnp.zeros((), scale_mean.dtype)
        return _product_moments(
            self.bias_mean, self.bias_log_variance, scale_mean, scale_variance, self.output_mask > 0
        )

    def with_weights_divided_by(self, factor: jax.Array) -> Self:
        """The same posterior with the weights before scaling, and the biases that share their scales, divided by ``factor`` [groups] > 0."""
        spread, bias_part = self.spread_over_kernel(factor), {}
        if self.group_axis == "output" and self.bias_mean is not None and self.bias_log_variance is not None:
            bias_part = {
                "bias_mean": self.bias_mean / factor,
                "bias_log_variance": self.bias_log_variance - 2 * jnp.log(factor),
            }
        return self.replace(  # type: ignore[attr-defined]
            kernel_mean=self.kernel_mean / spread,
            kernel_log_variance=self.kernel_log_variance - 2 * jnp.log(spread),
            **bias_part,
        )

    def with_weight_variances_up_to(self, largest: float | None) -> Self:
        """The same posterior with the variances of weights and biases brought down to ``largest``; None is no limit."""
        if largest is None:
            return self
        ceiling, bias = math.log(largest), self.bias_log_variance
        return self.replace(  # type: ignore[attr-defined]
            kernel_log_variance=jnp.minimum(self.kernel_log_variance, ceiling),
            bias_log_variance=None if bias is None else jnp.minimum(bias, ceiling),
        )

    def gaussian_kl(self) -> jax.Array:
        """KL of the Gaussian weights and biases from N(0, 1), summed over what is not pruned: the part that families share.

        KL(N(m, s2) || N(0, 1)) = (s2 + m^2 - 1 - log s2) / 2.
        """
        kernel_kl = _sum_standard_normal_kl(self.kernel_mean, self.kernel_log_variance, self.kernel_mask)
        return kernel_kl + self.gaussian_bias_kl()

    def gaussian_bias_kl(self) -> jax.Array:
        """The part of the biases in ``gaussian_kl``; 0 without a bias."""
        if self.bias_mean is None or self.bias_log_variance is None:
            return jnp.zeros(())
        return _sum_standard_normal_kl(self.bias_mean, self.bias_log_variance, self.output_mask > 0)


def log_ratio(noise: jax.Array, signal: jax.Array) -> jax.Array:
    """log(noise / signal); 1e9 where the signal is 0: such a unit goes first, and does so by a finite threshold."""
    return jnp.where(signal > 0, jnp.log(noise) - jnp.log(jnp.where(signal > 0, signal, 1)), 1e9)


def check_clip_var(clip_var: float | None) -> None:
    """Raises ValueError for what is not a positive finite number or None."""
    if clip_var is not None and not 0 < clip_var < math.inf:
        raise ValueError(f"clip_var is {clip_var}; it must be a positive finite variance, or None for no limit.")


def start_of_weights(
    key: jax.Array, kernel: jax.Array, bias: jax.Array | None, group_axis: GroupAxis, feature_group_count: int
) -> dict[str, Any]:
    """The shared fields of a fresh posterior, see ``GroupNormalJeffreys.create``: all is kept, log-variances are near -9."""
    kernel_key, bias_key = jax.random.split(key)
    inputs, features = kernel.shape[-2] * feature_group_count, kernel.shape[-1]
    return {
        "kernel_mean": kernel,
        "kernel_log_variance": near(START_LOG_VARIANCE, kernel_key, kernel.shape, kernel.dtype),
        "bias_mean": bias,
        "bias_log_variance": None if bias is None else near(START_LOG_VARIANCE, bias_key, bias.shape, bias.dtype),
        "input_mask": jnp.ones((inputs,), kernel.dtype),
        "output_mask": jnp.ones((features,), kernel.dtype),
        "group_axis": group_axis,
    }


def near(center: float, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Start values around ``center``, with a standard deviation of 0.01."""
    return center + _START_SPREAD * jax.random.normal(key, shape, dtype)


def kernel_mask(kernel_shape: tuple[int, ...], input_mask: jax.Array, output_mask: jax.Array) -> jax.Array:
    """Which entries of a kernel [*window, in / feature groups, out] connect kept inputs [in] with kept outputs [out].

    Returns:
      [in / feature groups, out] of bool, the same for all positions of the window.
    """
    inputs, features = kernel_shape[-2:]
    feature_groups = input_mask.shape[-1] // inputs
    kept_inputs = (input_mask > 0).reshape(feature_groups, inputs)
    return jnp.repeat(kept_inputs.T, features // feature_groups, axis=1) & (output_mask > 0)


def _product_moments(
    mean: jax.Array, log_variance: jax.Array, scale_mean: jax.Array, scale_variance: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    variance = jnp.exp(log_variance)
    product_variance = scale_mean**2 * variance + scale_variance * (mean**2 + variance)
    return jnp.where(mask, mean * scale_mean, 0), jnp.where(mask, product_variance, 0)


def _sum_standard_normal_kl(mean: jax.Array, log_variance: jax.Array, mask: jax.Array) -> jax.Array:
    # In float32 at least: the sum over a layer exceeds the largest float16.
    wide = jnp.promote_types(mean.dtype, jnp.float32)
    mean, log_variance = mean.astype(wide), log_variance.astype(wide)
    return 0.5 * jnp.sum(jnp.where(mask, jnp.exp(log_variance) + mean**2 - 1 - log_variance, 0))


def map_layers(function: Callable[[T], Any], params: PyTree, node_type: type[T]) -> PyTree:
    """Replaces every node of ``node_type`` in the tree by ``function(node)``; other leaves stay as they are."""
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, node_type) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, node_type),
    )


def map_named_layers(function: Callable[[str, T], Any], params: PyTree, node_type: type[T]) -> PyTree:
    """Like ``map_layers``, with the layer's name as first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(layer_name(path), leaf) if isinstance(leaf, node_type) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, node_type),
    )


def plain_layers(
    function: Callable[[Any], dict[str, jax.Array]],
    params: PyTree,
    node_types: type | tuple[type, ...],
    other: Callable[[jax.Array], jax.Array] = lambda leaf: leaf,
) -> PyTree:
    """The tree of the deterministic twin: nodes of the given types become ``function(node)``, other leaves ``other(leaf)``.

    What stands beside a node in its layer, of which it is the entry "posterior", stays beside the entries of ``function(node)``.
    """

    for name, layer in _layers_by_name(params, node_types).items():
        check_not_stacked(name, layer)

    def is_layer(node: Any) -> bool:
        return isinstance(node, node_types) or (
            isinstance(node, Mapping) and isinstance(node.get("posterior"), node_types)
        )

    def replace(node: Any) -> Any:
        if isinstance(node, node_types):
            return function(node)
        if isinstance(node, Mapping):
            others = {key: value for key, value in node.items() if key != "posterior"}
            return function(node["posterior"]) | jax.tree.map(replace, others, is_leaf=is_layer)
        return other(node)

    return jax.tree.map(replace, params, is_leaf=is_layer)


def _layers_by_name(params: PyTree, node_types: type | tuple[type, ...]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, node_types))
    return {layer_name(path): leaf for path, leaf in leaves if isinstance(leaf, node_types)}


def find_layers(params: PyTree, node_types: type | tuple[type, ...]) -> dict[str, Any]:
    """All nodes of the given types by layer name, in the order of the tree.

    The name is the path of the layer in the params tree, joined by "/", without the last entry:
    ``params["Dense_0"]["posterior"]`` is "Dense_0".

    Raises:
      ValueError: there is none.
    """
    found = _layers_by_name(params, node_types)
    if not found:
        nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=dataclasses.is_dataclass)
        others = [
            f"{layer_name(path)} is a {type(node).__name__}" for path, node in nodes if dataclasses.is_dataclass(node)
        ]
        top = ", ".join(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        more = f" ({', '.join(others)})" if others else ""
        raise ValueError(f"params holds no variational layers; it holds: {top or 'nothing'}{more}.")
    return found


def find_single_layers(params: PyTree, node_types: type | tuple[type, ...]) -> dict[str, Any]:
    """``find_layers`` for what does not work on stacked layers. Raises ValueError for those too, see ``check_not_stacked``."""
    found = find_layers(params, node_types)
    for name, layer in found.items():
        check_not_stacked(name, layer)
    return found


def check_not_stacked(name: str, layer: Any) -> None:
    """Raises ValueError for several layers in one node: their arrays would broadcast against each other to wrong results."""
    mask = layer.input_mask
    if getattr(mask, "ndim", 1) != 1:
        raise ValueError(
            f"{name} of params is several layers, stacked: its input_mask has shape {mask.shape}, where one axis is allowed. Params of many "
            "seeds, and layers under nn.vmap or nn.scan, must go through jax.vmap, or be taken apart by unstack(params, index)."
        )


def posteriors(params: PyTree) -> dict[str, Posterior]:
    """The posterior of each variational layer by layer name, in the order of the tree. Raises ValueError if there is none, or one that is several, stacked."""
    return find_single_layers(params, Posterior)


def array_names(paths: Sequence[tuple[Any, ...]], separator: str = "/") -> list[str]:
    """The names of the arrays at these paths, which are all of a params tree.

    A variable of an NNX State keeps its array as its only "value": there the name is that of the variable.
    """
    within = collections.Counter(path[:length] for path in paths for length in range(len(path)))

    def name(path: tuple[Any, ...]) -> str:
        alone = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value") and within[path[:-1]] == 1
        return jax.tree_util.keystr(path[:-1] if alone else path, simple=True, separator=separator)

    return [name(path) for path in paths]


def layer_name(path: tuple[Any, ...]) -> str:
    """The name under which reports and errors speak of the layer at this path of a params tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/posterior") or "params"
