"""The compressed file: a params tree of integers in as few bytes as they can be coded in. FORMAT.md specifies it."""

from bcdl_jax.codec.file import CompressedFileError, RecordSummary, decode, encode, load, save, summarize

__all__ = [
    "CompressedFileError",
    "RecordSummary",
    "decode",
    "encode",
    "load",
    "save",
    "summarize",
]
