"""Looks into compressed files: ``python -m bcdl_jax inspect FILE``, ``python -m bcdl_jax verify FILE``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from bcdl_jax.codec.file import CompressedFileError, RecordSummary, summarize


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bcdl_jax", description="Looks into files that bcdl_jax.save wrote."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "print shapes, kept indices, bits and bytes of every layer"),
        ("verify", "decode the file and say whether it is whole"),
    ):
        commands.add_parser(name, help=text, description=text.capitalize() + ".").add_argument("file", metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        data = Path(args.file).read_bytes()
        summaries = summarize(data)
    except OSError as error:
        print(f"error: {args.file} cannot be read: {error.strerror}.", file=sys.stderr)
        return 2
    except CompressedFileError as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    try:
        if args.command == "verify":
            print(f"{args.file}: whole, {len(summaries)} layers and arrays, {len(data):,} bytes")
        else:
            print_summaries(summaries, len(data))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def print_summaries(summaries: list[RecordSummary], size: int) -> None:
    """A table of the layers of a file of ``size`` bytes."""
    width = max([5, *(len(summary.name) for summary in summaries)])
    print(f"{'entry':<{width}}  {'shape':<18} {'kept':<18} {'bits':>4} {'bytes':>10} {'bits/weight':>11}")
    for summary in summaries:
        kept = math.prod(summary.kept)
        each = f"{8 * summary.bytes / kept:.2f}" if kept else "-"
        shape, left = ("x".join(map(str, sizes)) or "scalar" for sizes in (summary.shape, summary.kept))
        print(f"{summary.name:<{width}}  {shape:<18} {left:<18} {summary.bits:>4} {summary.bytes:>10,.0f} {each:>11}")
    whole = sum(math.prod(summary.shape) + summary.biases for summary in summaries)
    print(f"{size:,} bytes; these weights and biases in float32: {4 * whole:,} bytes ({4 * whole / size:.1f}x)")
    print(
        "bits: of an integer as it is; bits/weight: in the file, with the layer's biases, steps and sets of kept indices."
    )


if __name__ == "__main__":
    sys.exit(main())
