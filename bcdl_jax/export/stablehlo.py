"""Running a network elsewhere: as StableHLO, which needs JAX alone and none of the code that made it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bcdl_jax._atomic_file import check_writable, write_atomically

PyTree = Any
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_stablehlo(
    path: str | os.PathLike[str],
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> int:
    """Writes a network, its params inside, as serialised StableHLO. Needs ``flatbuffers`` (``pip install -e '.[export]'``).

    Args:
      path: the file. It is written under a temporary name and then renamed.
      apply: ``apply(params, *inputs)``, such as the small function of ``shrink``.
      params: its params.
      example_inputs: a tuple of inputs, or a single array, for their shapes and dtypes. The leading axis of the first array, wherever it stands in
        front, becomes a batch of any size.
      platforms: where it shall run, of "cpu", "cuda", "rocm" and "tpu".

    Returns:
      The number of bytes of the file. A file runs on the version of JAX that made it and on newer ones.

    Raises:
      ValueError: an input has no leading axis, a platform is unknown, or the network cannot run at any batch size.
      OSError: the file cannot be written.
    """
    if unknown := sorted({*platforms} - {*PLATFORMS}) or not platforms:
        raise ValueError(f"platforms are {unknown or 'empty'}; allowed are {', '.join(PLATFORMS)}.")
    check_writable(path)
    inputs = inputs_of_any_batch(example_inputs)
    function = jax.jit(lambda *arguments: apply(params, *arguments))
    with any_batch_or_error():
        exported = jax.export.export(function, platforms=tuple(platforms))(*inputs)
    data = bytes(exported.serialize())
    write_atomically(path, data)
    return len(data)


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., PyTree]:
    """The network of such a file, as a jitted function of the inputs.

    It is no more than ``jax.export.deserialize(bytes).call``, so a program that only has JAX can do the same.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no such file, or a damaged one.
    """
    data = bytearray(Path(path).read_bytes())
    try:
        exported = jax.export.deserialize(data)
    except ImportError:
        raise
    except Exception as error:  # whatever the reader of the format stumbles over
        raise ValueError(f"{path} is not a file of export_stablehlo, or it is damaged ({error}).") from error
    return jax.jit(exported.call)


@contextlib.contextmanager
def any_batch_or_error() -> Iterator[None]:
    """Turns what a model says to a batch of unknown size into one sentence."""
    try:
        yield
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The network cannot be traced for any batch size, so it cannot be exported: {detail}"
        ) from error


def inputs_of_any_batch(example_inputs: Any) -> tuple[PyTree, ...]:
    """Shapes and dtypes of the inputs, with "batch" in place of the leading axis of the first array, wherever it stands in front.

    Raises:
      ValueError: an input has no leading axis.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves = jax.tree.leaves(inputs)
    if not leaves or not np.ndim(leaves[0]):
        begin = "begin with a scalar" if leaves else "are empty"
        raise ValueError(f"example_inputs {begin}; they must begin with an array whose leading axis is the batch.")
    size = np.shape(leaves[0])[0]
    (batch,) = jax.export.symbolic_shape("batch")

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = np.shape(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)
        return jax.ShapeDtypeStruct((batch, *shape[1:]) if shape and shape[0] == size else shape, dtype)

    return jax.tree.map(struct, inputs)
