"""A family of priors and posteriors: the configuration of a variational layer, and the posterior that its training starts from."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from bcdl_jax.priors.formulas import START_LOG_VARIANCE, near
from bcdl_jax.priors.posterior import GroupAxis, Posterior


@dataclasses.dataclass(frozen=True)
class Family(abc.ABC):
    """A prior and the form of its posterior, such as ``GroupNormalJeffreys()``. ``Dense`` and ``Conv`` take one as ``family``.

    To add a prior, subclass ``Posterior``, then this class: set ``posterior_type`` to the new posterior and ``start_keys`` to the number of
    PRNG keys that its start values need, and implement ``start_fields``. README.md of this folder shows a complete example.

    Attributes:
      clip_var: Largest posterior variance of the layer's weights and biases, or None for no limit. ``clip_variances`` enforces it after
        each optimiser step. The first layer of a network that is trained from scratch needs one (0.04 for LeNet-300-100).

    Raises:
      ValueError: ``clip_var`` is not a positive finite number.
    """

    posterior_type: ClassVar[type[Posterior]]
    start_keys: ClassVar[int]

    clip_var: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.clip_var is not None and not 0 < self.clip_var < math.inf:
            raise ValueError(
                f"clip_var is {self.clip_var}; it must be a positive finite variance, or None for no limit."
            )

    @abc.abstractmethod
    def start_fields(self, keys: Sequence[jax.Array], kernel: jax.Array, groups: int) -> dict[str, jax.Array | float]:
        """The start values of the fields that the family adds to ``Posterior``.

        Args:
          keys: The PRNG keys, ``start_keys`` in number.
          kernel: The means of the weights, for shape and dtype.
          groups: The number of groups.

        Returns:
          The values of the fields by their names.
        """

    def create(
        self,
        key: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None,
        group_axis: GroupAxis,
        feature_group_count: int = 1,
    ) -> Posterior:
        """The posterior that training starts from: the given arrays are the means, and everything is kept.

        The log-variances of weights and biases start near -9, with a standard deviation of 0.01.

        Args:
          key: A PRNG key for the start values.
          kernel: The means of the weights, [*window, in / feature_group_count, out], from an initialiser or a trained network.
          bias: The means of the biases, [out], or None.
          group_axis: The side of the groups, "input" for dense layers and "output" for convolutions.
          feature_group_count: The number of feature groups of a grouped convolution.

        Returns:
          A posterior of type ``posterior_type``.

        Raises:
          ValueError: ``start_fields`` reads more than ``start_keys`` keys, or lacks a field or has one too many.
        """
        weights_key, *keys = jax.random.split(key, 1 + self.start_keys) if self.start_keys else [key]
        kernel_key, bias_key = jax.random.split(weights_key)
        inputs, features = kernel.shape[-2] * feature_group_count, kernel.shape[-1]
        return self.posterior_type(
            kernel_mean=kernel,
            kernel_log_variance=near(START_LOG_VARIANCE, kernel_key, kernel.shape, kernel.dtype),
            bias_mean=bias,
            bias_log_variance=None if bias is None else near(START_LOG_VARIANCE, bias_key, bias.shape, bias.dtype),
            input_mask=jnp.ones((inputs,), kernel.dtype),
            output_mask=jnp.ones((features,), kernel.dtype),
            group_axis=group_axis,
            clip_var=self.clip_var,
            **self._checked_start_fields(keys, kernel, inputs if group_axis == "input" else features),
        )

    def _checked_start_fields(
        self, keys: Sequence[jax.Array], kernel: jax.Array, groups: int
    ) -> dict[str, jax.Array | float]:
        """The result of ``start_fields``, which must be complete."""
        try:
            fields = self.start_fields(keys, kernel, groups)
        except IndexError as error:
            raise ValueError(
                f"{type(self).__name__}.start_fields reads more PRNG keys than start_keys, {self.start_keys}."
            ) from error
        shared = {field.name for field in dataclasses.fields(Posterior)}
        own = [field for field in dataclasses.fields(self.posterior_type) if field.name not in shared]
        required = {field.name for field in own if field.default is dataclasses.MISSING}
        if not required <= set(fields) <= {field.name for field in own}:
            raise ValueError(
                f"{type(self).__name__}.start_fields returns {', '.join(fields) or 'nothing'}; it must return the fields that "
                f"{self.posterior_type.__name__} adds to Posterior: {', '.join(field.name for field in own) or 'none'}."
            )
        return fields
