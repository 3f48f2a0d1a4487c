"""The compressed file: params trees of integers, entropy-coded. FORMAT.md specifies it byte by byte."""

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax.codec.file import RecordSummary, decode, encode, load, save, summarize
from bcdl_jax.codec.format import CompressedFileError

__all__ = [
    "CompressedFileError",
    "RecordSummary",
    "decode",
    "encode",
    "load",
    "save",
    "summarize",
    "write_atomically",
]
