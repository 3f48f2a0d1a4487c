"""Checkpoints of a run, from which it goes on to bit-identical parameters.

In the directory "checkpoints" of the run's output:

    frames/train-0012.npz    a frame of the pictures, written once
    000003/state/            the training state, at full size, written by Orbax
    000003/about.json        phase, settings, time spent, and what else the phase wants to know
    000003/metrics.jsonl     the run's metrics up to here
    000003/manifest.json     checksums of all these files and of the frames

A checkpoint is written under another name and renamed once it is complete and on the disk. One that does not fit its checksums is passed
over in favour of the one before; two of each phase are kept. They are removed when the run is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bcdl_jax
from experiments.io import files
from experiments.io.data import Dataset
from experiments.runtime import devices
from experiments.runtime.errors import UserError

DIRECTORY = "checkpoints"
# In their order: each has a training state of its own, and starts from where the one before ended.
PHASES = ("pretrain", "train", "fine_tune")
DEFAULT_EVERY = 5
_KEPT = 2
_WRITING = ".writing"
_STATE, _ABOUT, _MANIFEST, _FRAMES = "state", "about.json", "manifest.json", "frames"
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a phase goes on from: the state, whether it is the last one, its facts, and the frames of the pictures by epoch."""

    state: Any
    complete: bool
    facts: dict[str, Any]
    frames: dict[int, Arrays]


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      every: epochs from one to the next; 0 for none but those of signals.
      resumed: how often the run was taken up again.
      earlier_seconds: that were spent on what was taken up.
    """

    def __init__(self, out: Path, metrics: str, settings: Mapping[str, Any], every: int):
        """Args: out: of the run. metrics: name of its metrics file. settings: all that the parameters depend on, as JSON takes it."""
        self.every, self.resumed, self.earlier_seconds = every, 0, 0.0
        self._directory, self._metrics = out.absolute() / DIRECTORY, out.absolute() / metrics
        self._settings = _normal(settings)
        self._start = time.perf_counter()

    def resume(self) -> bool:
        """Takes up what earlier starts of the run left; False if there is no checkpoint. Damaged ones are removed.

        Raises:
          UserError: the run was started with other settings.
        """
        damage = {path: self._damage(path) for path in self._newest_first()}
        newest = next((path for path, found in damage.items() if not found), None)
        if newest is not None:
            about = _read_about(newest)
            if differences := _differences(about["settings"], self._settings):
                raise UserError(f"--resume cannot go on from {newest}, since {'; '.join(differences)}.")
            self.resumed, self.earlier_seconds = about["resumed"] + 1, about["seconds"]
            self._set_metrics(newest)
        for path, found in damage.items():
            if found:
                print(f"warning: Checkpoint {path} is damaged ({found}) and is passed over.", file=sys.stderr)
                shutil.rmtree(path)
        return newest is not None

    def restore(self, phase: str, like: Any) -> Restored | None:
        """What a phase goes on from, None if it starts anew; every process must call it.

        Unless the phase is complete, later phases start anew too, and the metrics file is set back.

        Args:
          phase: as given to ``save``.
          like: a state of the same shapes, on the devices where the restored one is to lie.
        """
        if jax.process_count() == 1:
            return self._restore(phase, like)
        # Process 0 alone reads the files, which the others may not have.
        here = bcdl_jax.train.fetch(like)
        found = self._restore(phase, here) if devices.is_writer() else None
        about = devices.same_facts(None if found is None else {"complete": found.complete, "facts": found.facts})
        if about is None:
            return None
        state, everywhere = (
            devices.same_everywhere(here if found is None else found.state),
            bcdl_jax.train.replicated(like),
        )
        if everywhere is not None:
            state = bcdl_jax.train.place_state(state, everywhere.mesh)  # type: ignore[arg-type]
        return Restored(state, about["complete"], about["facts"], {} if found is None else found.frames)

    def _restore(self, phase: str, like: Any) -> Restored | None:
        if not self.resumed:
            return None
        path = next((path for path in self._newest_first() if _read_about(path)["phase"] == phase), None)
        about: dict[str, Any] = {"complete": False, "frames": {}} if path is None else _read_about(path)
        if not about["complete"]:
            rank = PHASES.index(phase)
            for other in self._newest_first():
                if PHASES.index(_read_about(other)["phase"]) > rank:
                    shutil.rmtree(other)
            self._set_metrics(next(iter(self._newest_first()), None))
            for frame in self._frames_of(phase):
                if frame.name not in about["frames"]:
                    frame.unlink()
        if path is None:
            return None
        frames = {
            int(Path(name).stem.rpartition("-")[2]): _read_arrays(self._frames / name) for name in about["frames"]
        }
        return Restored(_read_state(path / _STATE, like), about["complete"], about["facts"], frames)

    def save(
        self, phase: str, state: Any, *, facts: Mapping[str, Any], frames: Mapping[int, Arrays], complete: bool = False
    ) -> Path | None:
        """Writes a checkpoint. Where that fails, on a full disk say, it warns and leaves the earlier ones.

        Args:
          phase: name of a part of the run that has a training state of its own.
          state: of that phase, at full size.
          facts: what else the phase wants to know again, as JSON takes it.
          frames: of the pictures so far, by epoch.
          complete: whether this is the end of the phase.

        Returns:
          The directory of the checkpoint, None if it could not be written, or this process writes none: process 0 does, but every
          process must call it.
        """
        if jax.process_count() > 1:
            state = bcdl_jax.train.fetch(state)
        if not devices.is_writer():
            return None
        existing = self._newest_first()
        path = self._directory / f"{1 + (int(existing[0].name) if existing else 0):06d}"
        writing = self._directory / f"{_WRITING}{path.name}"
        try:
            for unfinished in self._directory.glob(f"{_WRITING}*"):
                shutil.rmtree(unfinished)
            self._frames.mkdir(parents=True, exist_ok=True)
            frame_files = {epoch: self._frames / f"{phase}-{epoch:04d}.npz" for epoch in frames}
            for epoch, file in frame_files.items():
                if not file.exists():
                    files.write_arrays(file, frames[epoch])
            writing.mkdir()
            _write_state(writing / _STATE, state)
            about = {
                "phase": phase,
                "complete": complete,
                "settings": self._settings,
                "facts": facts,
                "frames": {file.name: _checksum(file) for file in frame_files.values()},
                "resumed": self.resumed,
                "seconds": self.earlier_seconds + time.perf_counter() - self._start,
            }
            files.write_json(writing / _ABOUT, about)
            if self._metrics.exists():
                shutil.copyfile(self._metrics, writing / self._metrics.name)
            _sync(self._frames, writing)
            files.write_json(writing / _MANIFEST, _checksums(writing))
            _sync(writing / _MANIFEST, writing)
            writing.rename(path)
            _sync(self._directory)
        except Exception as error:  # Orbax reports a full disk by errors of several kinds
            shutil.rmtree(writing, ignore_errors=True)
            last = f"the last one is {existing[0].name}" if existing else "there is none yet"
            print(
                f"warning: A checkpoint could not be written ({_first_line(error)}); training goes on, and {last}.",
                file=sys.stderr,
            )
            return None
        for old in [old for old in self._newest_first() if _read_about(old)["phase"] == phase][_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self) -> Path:
        """The directory of the newest checkpoint."""
        return self._newest_first()[0]

    def make_directory(self) -> None:
        """Makes the directory, by which a run that is cut short before its first checkpoint is known."""
        self._directory.mkdir()
        _sync(self._directory.parent)

    def remove(self) -> None:
        """Removes all checkpoints, at one stroke: a process killed meanwhile leaves no run that looks cut short."""
        removed = self._directory.with_name(f".{DIRECTORY}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self._directory.exists():
            self._directory.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    @property
    def _frames(self) -> Path:
        return self._directory / _FRAMES

    def _frames_of(self, phase: str) -> list[Path]:
        return list(self._frames.glob(f"{phase}-*.npz"))

    def _newest_first(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return sorted((path for path in self._directory.iterdir() if path.name.isdecimal()), reverse=True)

    def _set_metrics(self, checkpoint: Path | None) -> None:
        """Sets the metrics file back to that of a checkpoint, or to nothing."""
        copy = None if checkpoint is None else checkpoint / self._metrics.name
        if copy is None or not copy.exists():
            self._metrics.unlink(missing_ok=True)
            return
        content = copy.read_bytes()
        files.write_atomically(self._metrics, lambda file: file.write(content))

    def _damage(self, path: Path) -> str:
        """What is wrong with a checkpoint, "" if nothing is."""
        try:
            expected, found = json.loads((path / _MANIFEST).read_text()), _checksums(path)
            damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if not damaged:
                frames = _read_about(path)["frames"]
                damaged = [name for name, checksum in frames.items() if _checksum(self._frames / name) != checksum]
            return ", ".join(damaged)
        except (OSError, ValueError, AttributeError) as error:
            return _first_line(error)


def _read_about(path: Path) -> dict[str, Any]:
    return json.loads((path / _ABOUT).read_text())


def _first_line(error: Exception) -> str:
    full = os.strerror(errno.ENOSPC)
    if full in str(error):  # Orbax says so at the end of a page
        return full
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def are_in(out: str) -> bool:
    """Whether a run in this output directory was cut short."""
    return (Path(out) / DIRECTORY).is_dir()


def begin(
    out: str,
    settings: Mapping[str, Any],
    written: list[str],
    metrics: str,
    every: int,
    resume: bool,
    overwrite: bool,
) -> tuple[Path, Checkpoints]:
    """Prepares the output directory for a run that starts or goes on, and says which of the two it is where ``resume`` is asked for.

    Args:
      out: the directory.
      settings: of ``settings``.
      written: patterns of the files that a run writes, as for ``files.prepare_out``.
      metrics: which of them holds the metrics.
      every: epochs from one checkpoint to the next, as in ``Checkpoints``.
      resume: whether to go on with a run that was cut short there.
      overwrite: whether an earlier run's files may be replaced.

    Raises:
      UserError: the directory cannot be used, or the run in it was started with other settings.
    """
    checkpoints = Checkpoints(Path(out), metrics, settings, every)
    cut_short = resume and are_in(out)
    if cut_short and checkpoints.resume():
        print(f"Goes on with the run in {out}, from {checkpoints.newest()}.", flush=True)
        files.remove(Path(out), [name for name in written if name != metrics])  # they are made again
        return Path(out), checkpoints
    if resume:
        print(f"There is no checkpoint in {out}; the run starts from the beginning.", flush=True)
    directory = files.prepare_out(out, overwrite or cut_short, written)
    checkpoints.remove()
    checkpoints.make_directory()
    return directory, checkpoints


def settings(experiment: str, recipe: Any, dataset: Dataset, seeds: list[int], **others: Any) -> dict[str, Any]:
    """All that the parameters of a run depend on, by the names under which a difference is reported.

    Args:
      experiment: its name.
      recipe: a dataclass.
      dataset: its content counts, by checksum.
      seeds: of the run.
      others: settings beside the recipe, as JSON takes them.
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
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


def checksum(tree: Any) -> str | None:
    """A short checksum of all arrays of a tree; None of nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    content = hashlib.sha256()
    for path, leaf in leaves:
        content.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()[:16] if leaves else None


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    def shown(values: Mapping[str, Any], name: str) -> str:
        return json.dumps(values[name]) if name in values else "not set"

    return [
        f"{name} was {shown(there, name)} and is now {shown(asked, name)}"
        for name in [*there, *(name for name in asked if name not in there)]
        if shown(there, name) != shown(asked, name)
    ]


def _normal(value: Any) -> Any:
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log, which prints every error with the stacks of all its threads: the error itself is told by who catches it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checkpointer() -> Any:
    """Orbax, for this process alone."""
    import orbax.checkpoint as orbax

    alone = orbax.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="bcdl_jax")
    options = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    return orbax.StandardCheckpointer(**options)


def _write_state(path: Path, state: Any) -> None:
    with _quiet(), _checkpointer() as checkpointer:
        checkpointer.save(path, jax.tree.map(_key_data, state))
        checkpointer.wait_until_finished()


def _read_state(path: Path, like: Any) -> Any:
    def template(leaf: Any) -> Any:
        data = _key_data(leaf)
        return (
            data
            if isinstance(data, np.ndarray)
            else jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)
        )

    with _quiet(), _checkpointer() as checkpointer:
        found = checkpointer.restore(path, jax.tree.map(template, like))
    return jax.tree.map(
        lambda leaf, data: jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else data,
        like,
        found,
    )


def _key_data(leaf: Any) -> Any:
    """The numbers of a key, which Orbax does not write from one of several processes; other arrays as they are."""
    if not _is_key(leaf):
        return leaf
    data = jax.random.key_data(leaf)
    return data if jax.process_count() == 1 else np.asarray(data)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _read_arrays(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _checksums(directory: Path) -> dict[str, str]:
    """Of all files but the manifest, by path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / _MANIFEST)
    return {str(path.relative_to(directory)): _checksum(path) for path in paths}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(*paths: Path) -> None:
    """Brings files, and directories with all that is in them, onto the disk."""
    for path in paths:
        for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
