"""Training on the devices of one process by ``jax.pmap``, for programs that are built on it; see ``mesh`` for the usual way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bcdl_jax._tree import PyTree
from bcdl_jax.train.batches import count_examples
from bcdl_jax.train.step import Metrics, NegativeLogLikelihood, TrainState, make_train_step

_AXIS = "data"


def make_pmap_train_step(
    negative_log_likelihood: NegativeLogLikelihood,
    optimizer: optax.GradientTransformation,
    *,
    devices: Sequence[jax.Device] | None = None,
    **options: Any,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The training step with each batch spread over devices: ``step(state, batch) -> (state, metrics)``, already compiled.

    Every device has noise of its own, so that with noise the result is another draw than that of ``make_train_step``.

    Args:
      negative_log_likelihood: as for ``make_train_step``.
      optimizer: as for ``make_train_step``.
      devices: those of this process if None.
      **options: as for ``make_train_step``.

    Returns:
      The step; it raises ValueError for a batch whose size is not a multiple of the number of devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    step = make_train_step(average_over(_AXIS, negative_log_likelihood), optimizer, **options)
    on_all = jax.pmap(step, axis_name=_AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
    spread = NamedSharding(Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,)), PartitionSpec(_AXIS))

    def pmap_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        size = count_examples(batch)
        if size % len(devices):
            raise ValueError(f"batch has {size} examples; it must be a multiple of the {len(devices)} devices.")
        parts = jax.tree.map(lambda array: array.reshape(len(devices), -1, *array.shape[1:]), batch)
        return on_all(state, jax.device_put(parts, spread))  # wherever it lay: pmap itself moves nothing

    return pmap_step


def average_over(axis_name: str, negative_log_likelihood: NegativeLogLikelihood) -> NegativeLogLikelihood:
    """The likelihood of a batch of which each device along a mapped axis has a part.

    Value and gradient are averaged over the axis; the KL, which every device computes alike, stays outside and is counted once. The
    gradient is taken on each device before averaging, not through the average: what the derivative of a sum over devices
    is depends on how the program is mapped, and is n_devices times too large in some.

    Args:
      axis_name: of the ``jax.pmap`` around it.
      negative_log_likelihood: (params, batch, key) -> mean over the batch, a scalar.
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
