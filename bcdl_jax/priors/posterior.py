"""The approximate posterior of one layer: a typed pytree node inside the params tree.

Every transform of this library (KL divergence, pruning, precision, rates) finds the variational layers of a params tree by the type of
this node, and the role of each of its arrays by the kind that the field declares.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax._arrays import in_float32, of_rank
from bcdl_jax._tree import PyTree, find_single_layers
from bcdl_jax.priors.layer_node import ARRAY_AXES, FLOAT_BITS, GroupAxis, LayerNode

# The role of an array of a posterior: means of weights or biases, logarithms of any variances, location parameters of the group scales,
# or a mask. Each array field declares its kind as metadata, beside its axis, see ``LayerNode``.
Kind = Literal["mean", "log_variance", "scale", "mask"]


class WeightsNode(Protocol):
    """The part of a node that a layer needs to compute its mean. Posteriors and quantised layers have it."""

    @property
    def kernel_shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> jnp.dtype: ...

    @property
    def input_mask(self) -> jax.Array: ...

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]: ...


class Posterior(LayerNode, flax.struct.PyTreeNode):
    """q(w, z) of one layer: Gaussian weights w~, one scale z per group of weights, and the masks of the groups that are kept.

    A group is one input unit of a dense layer (``group_axis="input"``: a row of the kernel) or one output channel of a convolution
    (``group_axis="output"``: the kernel and the bias of that channel). The layer uses the weights w = w~ z [L17 section 3].

    Pruning removes whole groups, unless the family prunes single weights (``prunes_weights``). Subclasses add the parameters of q(z) and
    implement the abstract methods.

    Attributes:
      kernel_mean: Means of w~, [*window, in / feature groups, out]. A dense layer has no window axes.
      kernel_log_variance: Natural logarithms of the variances of w~, of the shape of ``kernel_mean``.
      bias_mean: Means of the biases, [out], or None for a layer without bias.
      bias_log_variance: Natural logarithms of the variances of the biases, [out], or None.
      input_mask: Mask of the inputs, [in]. An input whose entry is not positive is pruned. The mask is a leaf of the tree, so that it can
        be batched and sharded like the other arrays; its gradient is zero.
      output_mask: Mask of the outputs, [out], in the same form.
      group_axis: The side of the groups, "input" or "output".
      clip_var: The largest variance of weights and biases, which ``clip_variances`` enforces, or None for no limit.
      prunes_weights: True for a family that prunes single weights, a constant of the class. Each kept weight is then stored with its index.
    """

    layer_kind: ClassVar[str] = "variational layers"
    layer_source: ClassVar[str] = (
        "The layers bcdl_jax.Dense and bcdl_jax.Conv make variational layers; reduce_precision makes quantised layers of them."
    )
    prunes_weights: ClassVar[bool] = False

    kernel_mean: jax.Array = flax.struct.field(metadata={"kind": "mean", "axis": "kernel"})
    kernel_log_variance: jax.Array = flax.struct.field(metadata={"kind": "log_variance", "axis": "kernel"})
    bias_mean: jax.Array | None = flax.struct.field(metadata={"kind": "mean", "axis": "output"})
    bias_log_variance: jax.Array | None = flax.struct.field(metadata={"kind": "log_variance", "axis": "output"})
    input_mask: jax.Array = flax.struct.field(metadata={"kind": "mask", "axis": "input"})
    output_mask: jax.Array = flax.struct.field(metadata={"kind": "mask", "axis": "output"})
    group_axis: GroupAxis = flax.struct.field(pytree_node=False)
    clip_var: float | None = flax.struct.field(pytree_node=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for field in dataclasses.fields(cls):
            if not field.metadata.get("pytree_node", True):
                continue
            for name, allowed in (("kind", get_args(Kind)), ("axis", (*ARRAY_AXES, None))):
                if name not in field.metadata or field.metadata[name] not in allowed:
                    given = f"{name} {field.metadata[name]!r}" if name in field.metadata else f"no {name}"
                    raise TypeError(
                        f"Field {field.name} of {cls.__name__} has {given}; declare it as flax.struct.field(metadata={{'kind': kind, 'axis': "
                        f"axis}}), where {name} is one of {', '.join(map(str, allowed))}."
                    )

    # The methods that each family implements.

    @property
    @abc.abstractmethod
    def default_threshold(self) -> float:
        """A log dropout rate above which a group carries almost no signal, for progress reports. Pruning should use chosen thresholds."""

    @abc.abstractmethod
    def kl_divergence(self) -> jax.Array:
        """KL(q || prior) in nats, a scalar: the sum over all kept weights, biases and scales."""

    @abc.abstractmethod
    def log_dropout_rate(self) -> jax.Array:
        """The pruning score of each unit, of the shape of ``unit_mask``. A unit is kept while its score is below a threshold."""

    @abc.abstractmethod
    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of z, each [groups]."""

    @abc.abstractmethod
    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        """One draw of z per example: [num_examples, groups]. The draw of example i depends on the key and on i alone."""

    # Defaults for families whose units are the groups.

    @property
    def unit_mask(self) -> jax.Array:
        """Mask of the units, which pruning removes as a whole: the groups, [groups], or the weights, of the kernel's shape."""
        return self.group_mask

    def group_scores(self) -> jax.Array:
        """The pruning score of each group, [groups]. Plots of groups use it."""
        return self.log_dropout_rate()

    def log_noise_to_signal(self) -> jax.Array:
        """log(sum of Var[w] / sum of E[w]^2) over the weights of each unit, of the shape of ``unit_mask``.

        A unit without signal has the score 1e9. Unlike a log dropout rate, this score counts the noise of both w~ and z, and it does not
        depend on the division of the magnitude between the two.
        """
        # Rounding to float16 would make scores equal, and units with equal scores are pruned together.
        mean, variance = self.in_float32().kernel_moments()
        own = mean.ndim - (2 if self.group_axis == "input" else 1)
        others = tuple(axis for axis in range(mean.ndim) if axis != own)
        return log_ratio(jnp.sum(variance, others), jnp.sum(mean**2, others))

    def sampled_moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of w~ as the layer samples it, each of the kernel's shape."""
        return self.kernel_mean, jnp.exp(self.kernel_log_variance)

    def prune_units(self, keep: jax.Array) -> Self:
        """The posterior without the units that are not in ``keep``, an array of bool of the shape of ``unit_mask``."""
        side = "input_mask" if self.group_axis == "input" else "output_mask"
        return self.replace(**{side: self.group_mask * keep.astype(self.group_mask.dtype)})

    def inputs_read_by(self, outputs: jax.Array) -> jax.Array:
        """Mask of the inputs that any of the kept ``outputs`` reads, [in] of bool. ``outputs`` is [out] of bool."""
        return jnp.broadcast_to(jnp.any(outputs), self.input_mask.shape)

    def with_masks(self, inputs: jax.Array, outputs: jax.Array) -> Self:
        """The posterior with these masks of its inputs and outputs, [in] and [out] of bool."""
        dtype = self.input_mask.dtype
        return self.replace(input_mask=inputs.astype(dtype), output_mask=outputs.astype(dtype))

    def with_scales_times(self, factor: jax.Array) -> Self:
        """The same distribution of w, with every z multiplied by ``factor`` [groups]. A family without scales returns itself."""
        return self

    # Everything below holds for every family.

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.kernel_mean.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel_mean.dtype

    @property
    def bias_size(self) -> int:
        return 0 if self.bias_mean is None else self.bias_mean.size

    @property
    def bits_per_weight(self) -> int:
        return FLOAT_BITS

    @property
    def bits_per_bias(self) -> int:
        return FLOAT_BITS if self.bias_size else 0

    @property
    def step_bits(self) -> int:
        return 0

    def in_float32(self) -> Self:
        """The posterior with arrays of float32 at least, for its KL divergence, scores and variances: half precision rounds them to zero."""
        return jax.tree.map(in_float32, self)

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Posterior means of the kernel and the bias in use, exactly zero where pruned. The bias is None for a layer without one."""
        wide = self.in_float32()
        bias = wide.bias_moments()
        return wide.kernel_moments()[0].astype(self.dtype), None if bias is None else bias[0].astype(self.dtype)

    def spread_over_kernel(self, per_group: jax.Array) -> jax.Array:
        """Reshapes an array [groups] such that it broadcasts against the kernel."""
        return of_rank(per_group[:, None] if self.group_axis == "input" else per_group, self.kernel_mean.ndim)

    def kernel_moments(self) -> tuple[jax.Array, jax.Array]:
        """Posterior mean and variance of w = w~ z, each of the kernel's shape, exactly zero where pruned.

        With w~ and z independent: E[w] = E[w~] E[z] and Var[w] = E[z]^2 Var[w~] + Var[z] (E[w~]^2 + Var[w~]).
        """
        scale_mean, scale_variance = map(self.spread_over_kernel, self.scale_moments())
        return _product_moments(
            self.kernel_mean, self.kernel_log_variance, scale_mean, scale_variance, self.kernel_mask
        )

    def bias_moments(self) -> tuple[jax.Array, jax.Array] | None:
        """Posterior mean and variance of the biases in use, each [out], zero where pruned; None for a layer without bias.

        The bias of an output group shares the group's z. The bias of a layer with input groups has no scale.
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
        """The posterior with w~, and the biases that share its scales, divided by ``factor`` [groups] > 0."""
        spread, bias = self.spread_over_kernel(factor), {}
        if self.group_axis == "output" and self.bias_mean is not None and self.bias_log_variance is not None:
            bias = {
                "bias_mean": self.bias_mean / factor,
                "bias_log_variance": self.bias_log_variance - 2 * jnp.log(factor),
            }
        return self.replace(
            kernel_mean=self.kernel_mean / spread,
            kernel_log_variance=self.kernel_log_variance - 2 * jnp.log(spread),
            **bias,
        )

    def clip_variances(self) -> Self:
        """The posterior with the variances of weights and biases reduced to at most ``clip_var``."""
        if self.clip_var is None:
            return self
        ceiling, bias = math.log(self.clip_var), self.bias_log_variance
        return self.replace(
            kernel_log_variance=jnp.minimum(self.kernel_log_variance, ceiling),
            bias_log_variance=None if bias is None else jnp.minimum(bias, ceiling),
        )

    def gaussian_kl(self) -> jax.Array:
        """KL of the Gaussian w~ and biases from N(0, 1), summed over the kept entries. All families with scales share this part.

        KL(N(m, s2) || N(0, 1)) = (s2 + m^2 - 1 - log s2) / 2.
        """
        kernel_kl = _sum_standard_normal_kl(self.kernel_mean, self.kernel_log_variance, self.kernel_mask)
        return kernel_kl + self.gaussian_bias_kl()

    def gaussian_bias_kl(self) -> jax.Array:
        """The part of ``gaussian_kl`` that comes from the biases, or 0 for a layer without bias."""
        if self.bias_mean is None or self.bias_log_variance is None:
            return jnp.zeros(())
        return _sum_standard_normal_kl(self.bias_mean, self.bias_log_variance, self.output_mask > 0)


def variational_layers(params: PyTree) -> dict[str, Posterior]:
    """Finds the posteriors of all variational layers.

    Args:
      params: A tree with variational layers. They are found by the type of their nodes.

    Returns:
      The posteriors by layer name, in the order of the tree. The name is the path of the layer's module, joined by "/".

    Raises:
      ValueError: The tree holds no variational layer, or a node holds several stacked layers.
    """
    return find_single_layers(params, Posterior)


def array_kinds(node: Posterior) -> dict[str, Kind]:
    """The kind of each array field by the field's name, see ``Kind``."""
    return {field.name: field.metadata["kind"] for field in dataclasses.fields(node) if "kind" in field.metadata}


def log_ratio(noise: jax.Array, signal: jax.Array) -> jax.Array:
    """log(noise / signal). It is 1e9 where the signal is 0, so that a finite threshold prunes such a unit, and prunes it first."""
    return jnp.where(signal > 0, jnp.log(noise) - jnp.log(jnp.where(signal > 0, signal, 1)), 1e9)


def _product_moments(
    mean: jax.Array, log_variance: jax.Array, scale_mean: jax.Array, scale_variance: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    variance = jnp.exp(log_variance)
    product_variance = scale_mean**2 * variance + scale_variance * (mean**2 + variance)
    return jnp.where(mask, mean * scale_mean, 0), jnp.where(mask, product_variance, 0)


def _sum_standard_normal_kl(mean: jax.Array, log_variance: jax.Array, mask: jax.Array) -> jax.Array:
    # The sum over a layer exceeds the largest float16.
    mean, log_variance = in_float32(mean), in_float32(log_variance)
    return 0.5 * jnp.sum(jnp.where(mask, jnp.exp(log_variance) + mean**2 - 1 - log_variance, 0))
