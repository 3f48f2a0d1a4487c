"""Compresses networks, looks at their files and runs them: ``python -m bcdl_jax compress|inspect|verify|run``."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax.codec import CompressedFileError, RecordSummary, summarize
from bcdl_jax.codec.format import MAX_BYTES
from bcdl_jax.command import CommandError, add_arguments, run_compress
from bcdl_jax.export import load_network
from bcdl_jax.export.network_file import is_network, network_parts


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Args:
      arguments: The arguments of the command line, or None for those of the process.
    """
    args = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal may lack letters of the names.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.command == "compress":
            run_compress(args)
        elif args.command == "run":
            _run(args)
        else:
            _look(args)
        sys.stdout.flush()
    except BrokenPipeError:  # A reader such as head closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except CompressedFileError as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename} cannot be read or written: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bcdl_jax", description="Compresses trained networks, looks at their files, and runs them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = (
        "make a trained network variational, train, prune, round and shrink it within a budget, and write it to files"
    )
    add_arguments(commands.add_parser("compress", help=text, description=text.capitalize() + "."))
    for name, text in (
        ("inspect", "print the shape, the kept indices, the bits and the bytes of each layer"),
        ("verify", "decode the file and report any damage"),
        ("run", "run the network of a file that a compressed network's save wrote, with its program"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("file", metavar="FILE")
        command.add_argument(
            "--max-bytes",
            type=int,
            default=MAX_BYTES,
            help="largest memory that the content may take (default: %(default)s)",
        )
    command.add_argument(
        "--input",
        metavar="X.npy",
        action="append",
        required=True,
        help="an array of inputs [examples, ...]; several inputs take several --input, in their order",
    )
    command.add_argument(
        "--output", metavar="Y.npy", help="file for the outputs; without it, their shape and first rows are printed"
    )
    return parser


def _look(args: argparse.Namespace) -> None:
    """Prints a table of the file's entries, or that the file is valid."""
    data = coded = Path(args.file).read_bytes()
    program = b""
    if is_network(data):
        program, coded = network_parts(data)
    summaries = summarize(coded, max_bytes=args.max_bytes)
    if args.command == "verify":
        more = f", a program of {len(program):,} bytes" if program else ""
        print(f"{args.file}: valid, {len(summaries)} layers and arrays{more}, {len(data):,} bytes")
        return
    print_summaries(summaries, len(coded))
    if program:
        print(f"program: {len(program):,} bytes; whole file: {len(data):,} bytes")


def _run(args: argparse.Namespace) -> None:
    """Runs the network on the inputs."""
    network = load_network(args.file, max_bytes=args.max_bytes)
    inputs = [_read_array(path) for path in args.input]
    try:
        outputs = jax.tree.leaves(network(*inputs))
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{array.dtype} {array.shape}" for array in inputs)
        raise CommandError(
            f"The network of {args.file} does not take inputs of {given}: {str(error).splitlines()[0]}"
        ) from error
    if args.output is None:
        for output in outputs:
            print(f"{output.dtype} {output.shape}")
            print(np.asarray(output[:5] if output.ndim else output))
        return
    if len(outputs) != 1:
        raise CommandError(f"The network of {args.file} has {len(outputs)} outputs; --output takes one. Leave it out.")
    write_atomically(args.output, lambda file: np.save(file, np.asarray(outputs[0])))


def _read_array(path: str) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise CommandError(f"--input {path} is not an array in NumPy's format .npy.") from error


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
