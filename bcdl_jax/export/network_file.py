"""A network in one file: its program and its coded params. It runs with this library alone, without the code of the model.

The file holds, in this order: "BCDN"; a byte, the version, 1; 8 bytes, the length of the program, little-endian; the program, which is the
serialised StableHLO of ``jax.export`` under zlib; the content of a file of ``save``; 4 bytes, the CRC-32 of all bytes before them,
little-endian.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from bcdl_jax._atomic_file import check_writable, write_atomically
from bcdl_jax._tree import PyTree
from bcdl_jax.codec.file import encode
from bcdl_jax.codec.format import MAX_BYTES, CompressedFileError
from bcdl_jax.codec.reader import FileReader
from bcdl_jax.export.stablehlo import check_platforms
from bcdl_jax.export.symbolic_batch import batch_size_errors, symbolic_inputs

_MAGIC, _VERSION, _LENGTH, _CHECKSUM = b"BCDN", 1, 8, 4


def save_network(
    path: str | os.PathLike[str],
    apply: Callable[..., PyTree],
    params: PyTree,
    example_inputs: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> tuple[int, int]:
    """Writes a network to one file: its program, and its params as ``save`` codes them.

    Args:
      path: The file. It is written under a temporary name and then renamed.
      apply: The network, ``apply(params, *inputs)``, such as the small function from ``shrink``.
      params: The params: a tree of quantised layers and arrays.
      example_inputs: A tuple of inputs, or a single array, see ``export_stablehlo``. The network in the file takes any batch size.
      platforms: The platforms on which the file shall run, of "cpu", "cuda", "rocm" and "tpu".

    Returns:
      The number of bytes of the program, and of the coded params.

    Raises:
      ValueError: ``params`` holds a posterior or an array that a file cannot hold, the first input has no leading axis, a platform is unknown,
        or the network does not run at every batch size.
      OSError: The file cannot be written.
    """
    check_platforms(platforms)
    check_writable(path)
    coded = encode(params, names=True)
    program = zlib.compress(_program(apply, params, example_inputs, platforms), 9)
    data = _MAGIC + bytes([_VERSION]) + len(program).to_bytes(_LENGTH, "little") + program + coded
    data += zlib.crc32(data).to_bytes(_CHECKSUM, "little")
    write_atomically(path, lambda file: file.write(data))
    return len(program), len(coded)


def _program(apply: Callable[..., PyTree], params: PyTree, example_inputs: Any, platforms: Sequence[str]) -> bytes:
    """The program that takes the arrays of the params as a list, since a program cannot name the nodes of this library."""
    leaves, structure = jax.tree.flatten(params)
    function = jax.jit(lambda arrays, *inputs: apply(jax.tree.unflatten(structure, arrays), *inputs))
    inputs = symbolic_inputs(example_inputs)
    with batch_size_errors():
        exported = jax.export.export(function, platforms=tuple(platforms))(leaves, *inputs)
    return bytes(exported.serialize())


def check_exportable(apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> None:
    """Raises ValueError if ``save_network`` cannot write the program of a network, such as one that runs at one batch size alone."""
    _program(apply, params, example_inputs, ("cpu",))


def load_network(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Callable[..., PyTree]:
    """Loads the network from a file that ``save_network`` wrote.

    Args:
      path: The file.
      max_bytes: The largest memory that the params may take, 4 GiB by default.

    Returns:
      A jitted function of the inputs.

    Raises:
      CompressedFileError: The file is damaged or of another kind, or its params are larger than ``max_bytes``.
      OSError: The file cannot be read.
    """
    program, coded = network_parts(Path(path).read_bytes())
    exported = jax.export.deserialize(bytearray(zlib.decompress(program)))
    values = [value for value, _ in FileReader(coded, max_bytes).entries()]
    arrays = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(values)]
    return jax.jit(lambda *inputs: exported.call(arrays, *inputs))


def is_network(data: bytes) -> bool:
    """Whether a file of this content begins like one of ``save_network``."""
    return data.startswith(_MAGIC)


def network_parts(data: bytes) -> tuple[bytes, bytes]:
    """The compressed program and the coded params of a file's content.

    Args:
      data: The content of a file that ``save_network`` wrote.

    Raises:
      CompressedFileError: The content is damaged or of another kind.
    """
    if not is_network(data):
        raise CompressedFileError(f"This is not a network file: it does not begin with {_MAGIC.decode()}.")
    start = len(_MAGIC) + 1 + _LENGTH
    if zlib.crc32(data[:-_CHECKSUM]).to_bytes(_CHECKSUM, "little") != data[-_CHECKSUM:] or len(data) < start:
        raise CompressedFileError("The file is damaged: its checksum does not match.")
    if data[len(_MAGIC)] != _VERSION:
        raise CompressedFileError(
            f"The file has format version {data[len(_MAGIC)]}; this library reads version {_VERSION}."
        )
    end = start + int.from_bytes(data[start - _LENGTH : start], "little")
    return data[start:end], data[end:-_CHECKSUM]
