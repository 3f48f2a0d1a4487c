"""The context of a run, the networks that come out of it, and the names of its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from experiments.io import files
from experiments.io.checkpoints import Checkpoints
from experiments.io.data import Dataset
from experiments.io.logs import Logs
from experiments.pipeline.snapshots import Snapshot

PRETRAINED, STAGES = "pretrained", ("trained", "pruned", "reduced")
RESULT, INTERRUPTED = "result.json", "interrupted.npz"


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Everything that the parts of a run share.

    Attributes:
      model: The network, called with images of uint8. Its field ``family`` makes it plain where it is None.
      dataset: The data. Compression uses its training and validation parts only.
      recipe: The recipe of the run.
      chain: Layer names in the order of the data flow.
      seeds: The seeds, one network each.
      out: The directory for the files.
      logs: The metrics of the run.
      checkpoints: The checkpoints of the run.
      mesh: The devices to train on, from ``bcdl_jax.train.make_mesh``; None for one device. The training examples must be a multiple of the
        devices, and the recipe must not shrink. Every process of the mesh has a context, with an ``out`` of its own.
      thresholds: Thresholds by layer name; None to choose them on the validation data.
      profile_steps: The number of training steps to profile; 0 for none.
    """

    model: nn.Module
    dataset: Dataset
    recipe: Any
    chain: tuple[str, ...]
    seeds: Sequence[int]
    out: Path
    logs: Logs
    checkpoints: Checkpoints
    mesh: Mesh | None = None
    thresholds: dict[str, float] | None = None
    profile_steps: int = 0

    @property
    def plain_model(self) -> Any:
        """The plain twin of the network."""
        return self.model.clone(family=None)  # type: ignore[call-arg]

    def write_params(self, stage: str, params: Sequence[Any]) -> None:
        """Writes the params of one stage, one file per seed."""
        for net, seed in zip(params, self.seeds, strict=True):
            files.write_arrays(self.out / params_file(stage, seed), net)


@dataclasses.dataclass(frozen=True)
class RunNetworks:
    """The networks that a run made. Lists hold an entry per seed; the snapshots are those of the first seed.

    Attributes:
      pretrained: Params of the plain twin; None where training started from scratch.
      params: Variational params by stage. Plain methods give them the form of sparse variational dropout.
      thresholds: Thresholds by layer name; None for plain methods.
      relative_steps: Relative steps of the rounding; None for plain methods.
      by_round_off: Params that were rounded by the rule of the paper's code; None for plain methods.
      failures: The failure message of a seed, or None.
      files: The compressed files.
      snapshots: The frames of the pictures.
      seconds: The time that the run took, earlier starts included.
      resumed: The number of times that the run was resumed.
    """

    pretrained: list[Any] | None
    params: dict[str, list[Any]]
    thresholds: list[dict[str, float]] | None
    relative_steps: list[float] | None
    by_round_off: list[Any] | None
    failures: list[str | None]
    files: list[Path]
    snapshots: list[Snapshot]
    seconds: float
    resumed: int


def compressed_file(seed: int | str) -> str:
    """The name of the compressed file of a seed."""
    return f"compressed_seed{seed}.bcdl"


def params_file(stage: str, seed: int | str) -> str:
    """The name of the file with the params of a stage and a seed."""
    return f"{stage}_seed{seed}.npz"
