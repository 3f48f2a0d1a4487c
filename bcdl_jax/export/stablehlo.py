"""Networks as StableHLO, which runs with JAX alone, without the code of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from bcdl_jax._atomic_file import check_writable, write_atomically
from bcdl_jax._tree import PyTree
from bcdl_jax.export.symbolic_batch import batch_size_errors, symbolic_inputs

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_stablehlo(
    path: str | os.PathLike[str],
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> int:
    """Writes a network with its params as serialised StableHLO.

    Args:
      path: The file. It is written under a temporary name and then renamed.
      apply: The network, ``apply(params, *inputs)``, such as the small function from ``shrink``.
      params: The params of the network.
      example_inputs: A tuple of inputs, or a single array, for their shapes and dtypes. The first array begins with the batch axis. It and
        each other leading axis of the same length get a variable size. A network that samples takes a key of ``jax.random.key`` as an
        input; a raw key of ``jax.random.PRNGKey`` looks like a batch of numbers if the batch size is its length.
      platforms: The platforms on which the file shall run, of "cpu", "cuda", "rocm" and "tpu".

    Returns:
      The number of bytes of the file. The file runs on the version of JAX that wrote it and on newer ones.

    Raises:
      ValueError: The first input has no leading axis, a platform is unknown, or the network does not run at every batch size.
      OSError: The file cannot be written.
    """
    check_platforms(platforms)
    check_writable(path)
    inputs = symbolic_inputs(example_inputs)
    function = jax.jit(lambda *arguments: apply(params, *arguments))
    with batch_size_errors():
        exported = jax.export.export(function, platforms=tuple(platforms))(*inputs)
    data = bytes(exported.serialize())
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., PyTree]:
    """Loads the network from a file that ``export_stablehlo`` wrote.

    A program that has JAX alone can do the same with ``jax.export.deserialize(bytearray(data)).call``.

    Args:
      path: The file.

    Returns:
      A jitted function of the inputs.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is of another kind, or damaged.
    """
    data = bytearray(Path(path).read_bytes())
    try:
        exported = jax.export.deserialize(data)
    except ImportError:
        raise
    except Exception as error:  # The deserialiser documents no types of errors.
        raise ValueError(f"{path} is not a file of export_stablehlo, or it is damaged ({error}).") from error
    return jax.jit(exported.call)


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises ValueError for an unknown platform, or for none."""
    unknown = sorted({*platforms} - {*PLATFORMS})
    if unknown or not platforms:
        given = f"has the unknown entries {unknown}" if unknown else "is empty"
        raise ValueError(f"platforms {given}; allowed are {', '.join(PLATFORMS)}.")
