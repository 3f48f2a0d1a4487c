"""Running a network elsewhere: as StableHLO, which needs JAX alone and none of the code that made it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bcdl_jax.atomic_file import write_atomically

PyTree = Any


def export_stablehlo(
    path: str | os.PathLike[str],
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> int:
    """Writes a network, its params inside, as serialised StableHLO. Needs ``flatbuffers`` (``pip install 'bcdl-jax[export]'``).

    Args:
      path: the file. It is written under a temporary name and then renamed.
      apply: ``apply(params, *inputs)``, such as the small function of ``shrink``.
      params: its params.
      example_inputs: a tuple of inputs, or a single array, for their shapes and dtypes. The leading axis of the first array, wherever it stands in
        front, becomes a batch of any size.
      platforms: where it shall run.

    Returns:
      The number of bytes of the file. A file runs on the version of JAX that made it and on newer ones.

    Raises:
      ValueError: an input has no leading axis.
    """
    function = jax.jit(lambda *arguments: apply(params, *arguments))
    exported = jax.export.export(function, platforms=tuple(platforms))(*inputs_of_any_batch(example_inputs))
    data = bytes(exported.serialize())
    write_atomically(path, data)
    return len(data)


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., PyTree]:
    """The network of such a file, as a jitted function of the inputs.

    It is no more than ``jax.export.deserialize(bytes).call``, so a program that only has JAX can do the same.
    """
    return jax.jit(jax.export.deserialize(bytearray(Path(path).read_bytes())).call)


def inputs_of_any_batch(example_inputs: Any) -> tuple[PyTree, ...]:
    """Shapes and dtypes of the inputs, with "batch" in place of the leading axis of the first array, wherever it stands in front.

    Raises:
      ValueError: an input has no leading axis.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves = jax.tree.leaves(inputs)
    if not leaves or not np.ndim(leaves[0]):
        raise ValueError(
            "example_inputs begin with a scalar; they must begin with an array whose leading axis is the batch."
        )
    size = np.shape(leaves[0])[0]
    (batch,) = jax.export.symbolic_shape("batch")

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = np.shape(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)
        return jax.ShapeDtypeStruct((batch, *shape[1:]) if shape and shape[0] == size else shape, dtype)

    return jax.tree.map(struct, inputs)
