"""The arguments that the commands of the gallery share."""

from __future__ import annotations

import argparse

from experiments.gallery.entries import GALLERY
from experiments.gallery.entry import GalleryNetwork
from experiments.runtime.errors import UserError


def make_parser(command: str, description: str, out: str) -> argparse.ArgumentParser:
    """A parser with the shared arguments.

    Args:
      command: The name of the command.
      description: Its description.
      out: The default directory of the run, before the name of the network.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{command}", description=description)
    parser.add_argument("name", metavar="NAME", help=f"the network: {', '.join(GALLERY)}")
    parser.add_argument(
        "--data-dir", help="directory of tensorflow-datasets data (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)"
    )
    parser.add_argument("--out", help=f"directory of the run (default: {out}/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in --out")
    return parser


def chosen_network(args: argparse.Namespace) -> GalleryNetwork:
    """The network that the arguments name.

    Raises:
      UserError: There is no such network, or a package that it needs is not installed.
    """
    if args.name not in GALLERY:
        raise UserError(f"NAME is {args.name!r}; allowed are {', '.join(GALLERY)}.")
    network = GALLERY[args.name]
    network.check_packages()
    return network


def check_positive(option: str, value: int | None) -> None:
    """Raises UserError if a given number is not positive."""
    if value is not None and value < 1:
        raise UserError(f"{option} is {value}; it must be at least 1.")
