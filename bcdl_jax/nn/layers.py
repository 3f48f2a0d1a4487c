"""Variational Linen layers with the interface of ``flax.linen.Dense`` and ``flax.linen.Conv``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import NODE_ENTRY
from bcdl_jax.nn.linear_maps import ConvolutionMap, DenseMap, LinearMap
from bcdl_jax.nn.sampling import apply_mean, apply_sampled
from bcdl_jax.priors.family import Family
from bcdl_jax.priors.normal_jeffreys import GroupNormalJeffreys
from bcdl_jax.priors.posterior import GroupAxis, Posterior, WeightsNode

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Padding = str | int | Sequence[int | tuple[int, int]]

# The default initialisers of flax.linen, so that a variational layer starts at the weights of its deterministic twin.
_KERNEL_INIT = nn.initializers.lecun_normal()
_BIAS_INIT = nn.initializers.zeros_init()

_PAD_MODES: dict[str, Literal["wrap", "reflect"]] = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


class _VariationalLayer(nn.Module):
    """The common part of dense layers and convolutions: the posterior in the params tree, and the choice between mean and sample."""

    def _uses_means(self: Any, deterministic: bool | None) -> bool:
        """The flag of the call or of the attribute, True if neither is given."""
        if deterministic is not None and self.deterministic is not None:
            raise ValueError(
                f"{self._label()} has deterministic={self.deterministic} as an attribute and was called with "
                f"deterministic={deterministic}; give it once."
            )
        given = self.deterministic if deterministic is None else deterministic
        if isinstance(given, jax.core.Tracer):
            raise ValueError(
                f"{self._label()} was given a traced value as deterministic; it must be True or False. Under nn.remat, pass the flag by "
                "position with static_argnums=(2,), or to the layer as an attribute, deterministic=False."
            )
        return True if given is None else bool(given)

    def _posterior(
        self: Any, kernel_shape: tuple[int, ...], group_axis: GroupAxis, feature_group_count: int = 1
    ) -> WeightsNode:
        def create(key: jax.Array) -> Posterior:
            family_key, kernel_key, bias_key = jax.random.split(key, 3)
            kernel = self.kernel_init(kernel_key, kernel_shape, self.param_dtype)
            bias = self.bias_init(bias_key, kernel_shape[-1:], self.param_dtype) if self.use_bias else None
            return self.family.create(family_key, kernel, bias, group_axis, feature_group_count)

        if not self.has_variable("params", NODE_ENTRY):
            return self.param(NODE_ENTRY, create)
        # self.param would require the leaves of a fresh posterior. The tree may also hold another kind of node, such as a quantised layer,
        # so only the shape of the kernel is checked.
        node: WeightsNode = self.get_variable("params", NODE_ENTRY)
        if node.kernel_shape[1:] == kernel_shape:
            raise ValueError(
                f"{self._label()} was given the posteriors of {node.kernel_shape[0]} layers, stacked; apply params of many seeds with "
                "jax.vmap, or select one by bcdl_jax.train.select_seed(params, index)."
            )
        if node.kernel_shape != kernel_shape:
            raise ValueError(
                f"{self._label()} was given a posterior with kernel shape {node.kernel_shape}; its inputs and features need {kernel_shape}."
            )
        return node

    def _apply(
        self: Any, node: WeightsNode, inputs: jax.Array, deterministic: bool | None, linear_map: LinearMap
    ) -> jax.Array:
        deterministic = self._uses_means(deterministic)
        inputs = inputs.astype(self.dtype if self.dtype is not None else jnp.promote_types(inputs.dtype, node.dtype))
        if deterministic:
            return apply_mean(node, inputs, linear_map)
        if not isinstance(node, Posterior):
            raise ValueError(
                f"{self._label()} holds a {type(node).__name__}, which has no noise to sample; use deterministic=True."
            )
        if not self.has_rng("noise"):
            raise ValueError(
                f'{self._label()} samples its weights and needs a key: pass rngs={{"noise": key}}, or deterministic=True. A passed '
                'key does not reach the loop of nn.RNN, nn.scan or nn.vmap unless split_rngs holds "noise": True, such as '
                'nn.RNN(cell, split_rngs={"params": False, "noise": True}).'
            )
        return apply_sampled(node, inputs, self.make_rng("noise"), linear_map)

    def _check_features(self, features: int) -> None:
        if not isinstance(features, int | np.integer) or features < 1:
            raise ValueError(f"{self._label()} has features {features}; it must be an int of at least 1.")

    def _label(self) -> str:
        return f"Layer {'/'.join(self.path) or type(self).__name__}"


class Dense(_VariationalLayer):
    """A dense layer with a posterior over its weights and one group scale per input unit.

    Attributes:
      features: The number of output units.
      family: The prior and the form of the posterior.
      use_bias: True to add a bias.
      dtype: The dtype of the computation. None for the promoted dtype of inputs and parameters.
      param_dtype: The dtype of the parameters.
      precision: The precision of the matrix product, see ``jax.lax.Precision``.
      kernel_init: The initialiser of the means of the weights, called with (key, (in, out), param_dtype).
      bias_init: The initialiser of the means of the biases, called with (key, (out,), param_dtype).
      deterministic: The flag of the call, as an attribute. None to leave it to the call.
    """

    features: int
    family: Family = GroupNormalJeffreys()
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _KERNEL_INIT
    bias_init: Initializer = _BIAS_INIT
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: The inputs, [examples, ..., in], or [in] for a single example. The axes between the first and the last share the
            example's scales.
          deterministic: True for the posterior means, False to sample with the key of ``rngs={"noise": key}``. None for the attribute
            ``deterministic``, or True if that is None too.

        Returns:
          The outputs, [examples, ..., features], or [features] for a single example, whose noise is that of the first example of a batch.

        Raises:
          ValueError: The inputs are a scalar, ``features`` is not a positive int, the posterior has another kernel shape, there is no
            posterior or no noise key to sample with, or ``deterministic`` is given twice or traced.
        """
        inputs = jnp.asarray(inputs)
        if not inputs.ndim:
            raise ValueError(f"{self._label()} was given a scalar as inputs; it needs [examples, ..., in] or [in].")
        self._check_features(self.features)
        node = self._posterior((inputs.shape[-1], self.features), "input")
        if inputs.ndim == 1:
            outputs = self._apply(node, jnp.expand_dims(inputs, 0), deterministic, DenseMap(self.precision))
            return jnp.squeeze(outputs, 0)
        return self._apply(node, inputs, deterministic, DenseMap(self.precision))


class Conv(_VariationalLayer):
    """A convolution over one, two, three or more spatial axes, channels last, with one group scale per output channel.

    Attributes:
      features: The number of output channels.
      kernel_size: The shape of the window, one number per spatial axis. An int for one spatial axis.
      strides: The strides, an int for all axes or one per axis. None for 1.
      padding: The padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (one spatial axis), an int, or an int or a (low, high) pair per axis.
      input_dilation: The dilation of the inputs, an int for all axes or one per axis. None for 1.
      kernel_dilation: The dilation of the kernel, an int for all axes or one per axis. None for 1.
      feature_group_count: The number of groups that the channels are split into. Both channel counts must be multiples of it.
      family, use_bias, dtype, param_dtype, precision, kernel_init, bias_init, deterministic: The same settings as for ``Dense``. The kernel
        has shape [*kernel_size, in / feature_group_count, features].
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    family: Family = GroupNormalJeffreys()
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _KERNEL_INIT
    bias_init: Initializer = _BIAS_INIT
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: The inputs, [examples, ..., *spatial, in], or [*spatial, in] for a single example. The axes between the first and the
            spatial ones share the example's scales.
          deterministic: True for the posterior means, False to sample, None for the attribute, as in ``Dense``.

        Returns:
          The outputs, [examples, ..., *spatial out, features], or [*spatial out, features] for a single example.

        Raises:
          ValueError: The inputs have too few axes, a setting has a wrong value or number of entries, the posterior has another kernel shape,
            there is no posterior or no noise key to sample with, or ``deterministic`` is given twice or traced.
        """
        inputs = jnp.asarray(inputs)
        window = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        rank = len(window)
        if inputs.ndim < rank + 1:
            raise ValueError(
                f"{self._label()} was given inputs of shape {inputs.shape}; with kernel_size {window} it needs "
                f"[examples, ..., {rank} spatial axes, channels], or one example without the axis of examples."
            )
        self._check_features(self.features)
        for name, count in (("input", inputs.shape[-1]), ("output", self.features)):
            if self.feature_group_count < 1 or count % self.feature_group_count:
                raise ValueError(
                    f"{self._label()} has {count} {name} channels, which feature_group_count {self.feature_group_count} does not divide."
                )
        strides, input_dilation, kernel_dilation = (
            self._per_axis(name, rank) for name in ("strides", "input_dilation", "kernel_dilation")
        )
        kernel_shape = (*window, inputs.shape[-1] // self.feature_group_count, self.features)
        node = self._posterior(kernel_shape, "output", self.feature_group_count)

        linear_map = self._linear_map(window, strides, input_dilation, kernel_dilation)
        if inputs.ndim == rank + 1:
            return jnp.squeeze(self._apply(node, jnp.expand_dims(inputs, 0), deterministic, linear_map), 0)
        return self._apply(node, inputs, deterministic, linear_map)

    def _linear_map(
        self,
        window: tuple[int, ...],
        strides: tuple[int, ...],
        input_dilation: tuple[int, ...],
        kernel_dilation: tuple[int, ...],
    ) -> ConvolutionMap:
        """The convolution of the layer. Raises ValueError if the padding does not fit."""
        padding = self._padding(len(window))
        reach = [(size - 1) * dilation for size, dilation in zip(window, kernel_dilation, strict=True)]
        pad_mode = None
        if isinstance(padding, str) and padding == "CAUSAL":
            padding = [(reach[0], 0)]
        elif isinstance(padding, str) and padding in _PAD_MODES:
            pad_mode, padding = _PAD_MODES[padding], [(length // 2, length - length // 2) for length in reach]
        elif padding == "SAME" and max(input_dilation) > 1:
            raise ValueError(
                f"{self._label()} has padding 'SAME' with input_dilation {input_dilation}; give (low, high) pairs instead."
            )
        return ConvolutionMap(
            strides,
            padding,
            input_dilation,
            kernel_dilation,
            self.feature_group_count,
            self.precision,
            pad_mode,
        )

    def _per_axis(self, name: str, rank: int) -> tuple[int, ...]:
        value = getattr(self, name)
        value = 1 if value is None else value
        values = (value,) * rank if isinstance(value, int) else tuple(value)
        if len(values) != rank or any(entry < 1 for entry in values):
            raise ValueError(f"{self._label()} has {name} {value}; it must be a positive int or {rank} positive ints.")
        return values

    def _padding(self, rank: int) -> str | list[tuple[int, int]]:
        padding = self.padding
        if isinstance(padding, str):
            allowed = ["SAME", "VALID", *_PAD_MODES, *(["CAUSAL"] if rank == 1 else [])]
            if padding not in allowed:
                raise ValueError(
                    f"{self._label()} has padding {padding!r}; allowed are {', '.join(allowed)}, ints and (low, high) pairs."
                )
            return [(0, 0)] * rank if padding == "VALID" else padding
        entries = [padding] * rank if isinstance(padding, int) else list(padding)
        pairs = [(entry, entry) if isinstance(entry, int) else tuple(entry) for entry in entries]
        if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"{self._label()} has padding {padding!r}; it needs one int or (low, high) pair for each of {rank} axes."
            )
        return pairs  # type: ignore[return-value]
