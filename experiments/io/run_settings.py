"""The settings of a run: everything that its parameters depend on, stored with each checkpoint and compared when the run is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.io.dataset import Dataset
from experiments.runtime import machine


def settings(experiment: str, recipe: Any, dataset: Dataset, seeds: list[int], **others: Any) -> dict[str, Any]:
    """The settings of a run by name. A difference is reported under this name.

    Args:
      experiment: The name of the experiment.
      recipe: The recipe, a dataclass.
      dataset: The data set, whose content is one of the settings, as a checksum.
      seeds: The seeds of the run.
      others: Further settings, each a JSON value.
    """
    splits = [dataset.train, dataset.validation, dataset.test]
    devices = [device.device_kind for device in jax.devices()]
    return {
        "experiment": experiment,
        **dataclasses.asdict(recipe),
        "dataset": dataset.name,
        "content of the dataset": checksum([[split.images, split.labels] for split in splits]),
        "seeds": seeds,
        **others,
        "devices": f"{len(devices)} x {', '.join(sorted(set(devices)))}",
        **machine.package_versions(),
    }


def checksum(tree: Any) -> str | None:
    """A short checksum of all arrays of a tree; None for a tree without arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    content = hashlib.sha256()
    for path, leaf in leaves:
        content.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()[:16] if leaves else None


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the types that they have after they were written to a JSON file and read again."""
    return json.loads(json.dumps(settings))


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """One clause for each setting that differs, such as "epochs was 4 and is now 5"."""

    def shown(values: Mapping[str, Any], name: str) -> str:
        return json.dumps(values[name]) if name in values else "not set"

    return [
        f"{name} was {shown(stored, name)} and is now {shown(requested, name)}"
        for name in [*stored, *(name for name in requested if name not in stored)]
        if shown(stored, name) != shown(requested, name)
    ]
