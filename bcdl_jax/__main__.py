"""Inspects and verifies compressed files: ``python -m bcdl_jax inspect FILE``, ``python -m bcdl_jax verify FILE``."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path

from bcdl_jax.codec import CompressedFileError, RecordSummary, summarize
from bcdl_jax.codec.format import MAX_BYTES


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Args:
      arguments: The arguments of the command line, or None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bcdl_jax", description="Inspects and verifies files that bcdl_jax.save wrote."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "print the shape, the kept indices, the bits and the bytes of each layer"),
        ("verify", "decode the file and report any damage"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("file", metavar="FILE")
        command.add_argument(
            "--max-bytes",
            type=int,
            default=MAX_BYTES,
            help="largest memory that the content may take (default: %(default)s)",
        )
    args = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal may lack letters of the names.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        data = Path(args.file).read_bytes()
        summaries = summarize(data, max_bytes=args.max_bytes)
    except OSError as error:
        print(f"error: {args.file} cannot be read: {error.strerror}.", file=sys.stderr)
        return 2
    except CompressedFileError as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    try:
        if args.command == "verify":
            print(f"{args.file}: valid, {len(summaries)} layers and arrays, {len(data):,} bytes")
        else:
            print_summaries(summaries, len(data))
        sys.stdout.flush()
    except BrokenPipeError:  # A reader such as head closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def print_summaries(summaries: list[RecordSummary], size: int) -> None:
    """Prints a table of the entries of a file.

    Args:
      summaries: The summaries of the entries.
      size: The number of bytes of the file.
    """
    width = max([5, *(len(summary.name) for summary in summaries)])
    print(f"{'entry':<{width}}  {'shape':<18} {'kept':<18} {'bits':>4} {'bytes':>10} {'bits/weight':>11}")
    for summary in summaries:
        kept = math.prod(summary.kept)
        rate = f"{8 * summary.bytes / kept:.2f}" if kept else "-"
        shape, kept_shape = ("x".join(map(str, sizes)) or "scalar" for sizes in (summary.shape, summary.kept))
        print(
            f"{summary.name:<{width}}  {shape:<18} {kept_shape:<18} {summary.bits:>4} {summary.bytes:>10,.0f} {rate:>11}"
        )
    numbers = sum(math.prod(summary.shape) + summary.biases for summary in summaries)
    print(f"{size:,} bytes; these weights and biases in float32: {4 * numbers:,} bytes ({4 * numbers / size:.1f}x)")
    if floats := [summary for summary in summaries if summary.dtype == "float32"]:
        largest = max(floats, key=lambda summary: summary.bytes)
        print(
            f"not rounded: {len(floats)} float32 array{'s' * (len(floats) > 1)}, {sum(each.bytes for each in floats):,.0f} bytes; the largest "
            f"is {largest.name} with {largest.bytes:,.0f} bytes"
        )
    print(
        "bits: width of an integer; bits/weight: size in the file, with biases, steps and kept indices, per kept weight."
    )


if __name__ == "__main__":
    sys.exit(main())
