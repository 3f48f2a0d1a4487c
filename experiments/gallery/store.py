"""The trained networks of the gallery: the folder ``trained`` holds the variables and the errors of each."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.gallery.entry import Apply, GalleryNetwork
from experiments.runtime.errors import UserError

TRAINED = Path(__file__).parent / "trained"


def weights_name(network: GalleryNetwork) -> str:
    """The name of the file of the variables."""
    return f"{network.name}.bcdl"


def result_name(network: GalleryNetwork) -> str:
    """The name of the file of the errors."""
    return f"{network.name}.json"


def keep(directory: Path, names: Sequence[str]) -> None:
    """Copies files from the directory of a run to the folder ``trained``."""
    TRAINED.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(directory / name, TRAINED / name)


def load_trained(network: GalleryNetwork) -> tuple[Apply, Any]:
    """A trained network.

    Args:
      network: The network.

    Returns:
      The function ``apply(variables, inputs)`` and the trained variables.

    Raises:
      UserError: The folder does not hold the network.
    """
    path = TRAINED / weights_name(network)
    if not path.exists():
        raise UserError(f"{path} is missing; python -m experiments.gallery_train {network.name} makes it.")
    apply, variables = network.make(jax.random.key(0))
    return apply, jax.tree.map(jnp.asarray, bcdl_jax.load(path, variables))
