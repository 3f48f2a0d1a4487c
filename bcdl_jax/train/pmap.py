"""Training on the devices of one process with ``jax.pmap``, for programs that are built on it. Other programs should use ``mesh``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bcdl_jax._tree import PyTree
from bcdl_jax.train.batches import count_examples
from bcdl_jax.train.state import Metrics, NegativeLogLikelihood, TrainState
from bcdl_jax.train.step import make_train_step

_AXIS = "data"


def make_pmap_train_step(
    negative_log_likelihood: NegativeLogLikelihood,
    optimizer: optax.GradientTransformation,
    *,
    devices: Sequence[jax.Device] | None = None,
    **options: Any,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The compiled training step ``step(state, batch) -> (state, metrics)`` that spreads each batch over devices.

    Every device draws its own noise. The result therefore differs from the result of ``make_train_step`` as one draw differs from another.

    Args:
      negative_log_likelihood: The function for ``make_train_step``.
      optimizer: The optimiser for ``make_train_step``.
      devices: The devices to use; the devices of this process if None.
      **options: The other arguments of ``make_train_step``.

    Returns:
      The compiled step. It raises ValueError for a batch whose size is not a multiple of the number of devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    step = make_train_step(average_over(_AXIS, negative_log_likelihood), optimizer, **options)
    on_all = jax.pmap(step, axis_name=_AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
    spread = NamedSharding(Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,)), PartitionSpec(_AXIS))

    def pmap_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        size = count_examples(batch)
        if size % len(devices):
            raise ValueError(f"batch has {size} examples; it must be a multiple of the {len(devices)} devices.")
        per_device = jax.tree.map(lambda array: array.reshape(len(devices), -1, *array.shape[1:]), batch)
        # The batch may lie on any device, and pmap itself moves nothing.
        return on_all(state, jax.device_put(per_device, spread))

    return pmap_step


def average_over(axis_name: str, negative_log_likelihood: NegativeLogLikelihood) -> NegativeLogLikelihood:
    """The likelihood of a batch that is spread over the devices of a mapped axis.

    The value and the gradient are averaged over the axis. The KL is the same on every device; it is computed outside this function and
    counted once. Each device takes its gradient before the average. The gradient of the average itself would depend on how the program
    is mapped, and would be n_devices times too large in some programs.

    Args:
      axis_name: The name of the axis of the surrounding ``jax.pmap``.
      negative_log_likelihood: A function (params, batch, key) -> mean over the batch, a scalar.
    """

    def value_and_gradient(params: PyTree, batch: Any, key: jax.Array) -> tuple[jax.Array, PyTree]:
        own_key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        return jax.lax.pmean(jax.value_and_grad(negative_log_likelihood)(params, batch, own_key), axis_name)

    @jax.custom_vjp
    def averaged(params: PyTree, batch: Any, key: jax.Array) -> jax.Array:
        return value_and_gradient(params, batch, key)[0]

    def backward(gradient: PyTree, cotangent: jax.Array) -> tuple[PyTree, None, None]:
        return jax.tree.map(lambda slope: (cotangent * slope).astype(slope.dtype), gradient), None, None

    averaged.defvjp(value_and_gradient, backward)
    return averaged
