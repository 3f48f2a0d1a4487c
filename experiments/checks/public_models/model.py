"""Public models: a network from a package, its random weights, and the rule that zeroes a part of them."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The number of examples in the inputs that a model brings.
EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Units:
    """The form of a width that several units share, such as the gates of an LSTM or the heads of attention.

    Attributes:
      repeats: The number of times that the same units follow each other, such as the four gates of an LSTM.
      block: The number of neighbours that are zeroed together, such as the width of a head.
    """

    repeats: int = 1
    block: int = 1


@dataclasses.dataclass(frozen=True)
class PublicModel:
    """A network from a public package.

    Attributes:
      apply: The network, ``apply(params, *inputs)``.
      params: Its random weights.
      inputs: Example inputs, a batch of ``EXAMPLES``.
      output_axis: The axis of the outputs in the package's kernels: -1, or 0 for layouts such as PyTorch's.
      swapped: Parts of the paths of kernels whose outputs are on the other axis, the first or the last.
      kept: Widths that lose nothing, such as the number of classes.
      units: The forms of widths that are not single units.
      averages: Parts of the paths of averages in norms. These arrays lose nothing.
      heads: The number of heads of attention layers whose kernels have an axis of heads, or 0.
      tolerance: The largest allowed difference of outputs, relative to the largest output.
      is_flax: A flag for models of Flax layers, which ``torch_state_dict`` accepts.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    output_axis: int = -1
    swapped: tuple[str, ...] = ()
    kept: frozenset[int] = frozenset()
    units: Mapping[int, Units] = dataclasses.field(default_factory=dict)
    averages: tuple[str, ...] = ()
    heads: int = 0
    tolerance: float = 1e-3
    is_flax: bool = False


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` without optimisations, which do not pay for few calls of small networks."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def images(size: int, channels: int = 3) -> jax.Array:
    """A batch of square images with the channels last."""
    return jax.random.normal(jax.random.key(1), (EXAMPLES, size, size, channels))


def sequences(length: int, width: int) -> jax.Array:
    """A batch of sequences of vectors."""
    return jax.random.normal(jax.random.key(1), (EXAMPLES, length, width))


def tokens(length: int, vocabulary: int, seed: int = 1) -> jax.Array:
    """A batch of sequences of integers from 1 to ``vocabulary`` - 1."""
    return jax.random.randint(jax.random.key(seed), (EXAMPLES, length), 1, vocabulary)


def with_zeros(model: PublicModel, own_choice: bool) -> Any:
    """The weights of a model, of which a third of the units are zeroed.

    First, every vector and every array of zeros gets small positive noise, since biases of new layers are zeros. Then each array of floats
    loses a third of the indices of its output axis: the axis of outputs in a kernel, the only axis in a bias or the scale of a norm. The
    choice is random, and depends on the length of the axis alone, so that all layers of the same width lose the same units, also behind a
    residual connection.

    Args:
      model: The model.
      own_choice: True to let the choice depend on the layer too. Layers then agree on nothing, and norms turn zeroed channels into constants.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.params)
    pruned = []
    for place, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path)
        layer = jax.tree_util.keystr(path[:-1]) if own_choice else ""
        is_average = any(part in name for part in model.averages)
        is_swapped = any(part in name for part in model.swapped)
        axis = -1 - model.output_axis if is_swapped else model.output_axis
        pruned.append(leaf if is_average else _pruned_array(model, np.asarray(leaf), axis, layer, place))
    return jax.tree.unflatten(structure, pruned)


def _pruned_array(model: PublicModel, array: np.ndarray, axis: int, layer: str, seed: int) -> jax.Array:
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.ndim:
        return jnp.asarray(array)
    array = array.copy()
    if array.ndim == 1 or not array.any():
        noise = np.random.default_rng(seed).uniform(0.02, 0.1, array.shape)
        array += noise.astype(array.dtype)
    axis = axis if array.ndim > 1 else 0
    _zero(array, axis, _dead_units(model, array.shape[axis], layer))
    if model.heads and array.ndim > 1 and array.shape[-2] == model.heads:
        _zero(array, -2, _dead_units(model, model.heads, layer))
    return jnp.asarray(array)


def _zero(array: np.ndarray, axis: int, indices: np.ndarray) -> None:
    np.moveaxis(array, axis, 0)[indices] = 0


def _dead_units(model: PublicModel, width: int, layer: str) -> np.ndarray:
    """The indices that layers of a width lose: a third of them, rounded down."""
    if width in model.kept:
        return np.empty(0, int)
    form = model.units.get(width, Units())
    single = width // form.repeats
    blocks = single // form.block
    # Gates and their units make the same choice, so the seed is the number of blocks.
    generator = np.random.default_rng([zlib.crc32(layer.encode()), blocks])
    chosen = generator.permutation(blocks)[: blocks // 3]
    units = (chosen[:, None] * form.block + np.arange(form.block)).ravel()
    return (np.arange(form.repeats)[:, None] * single + units).ravel()
