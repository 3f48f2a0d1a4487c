"""Checkpoints of a run. A run that is resumed from a checkpoint ends with bit-identical parameters.

The directory "checkpoints" of the run's output holds:

    frames/train-0012.npz    a frame of the pictures, written once
    000003/state/            the training state, at full size, written by Orbax
    000003/about.json        the phase, the settings, the training time and the facts of the phase
    000003/metrics.jsonl     the run's metrics up to this point
    000003/manifest.json     the checksums of all these files; about.json holds the checksums of the frames

A checkpoint is written under another name and renamed once it is complete and on the disk. A checkpoint that does not fit its checksums
is skipped, and the one before it is used: the newest two of each phase are kept. All are removed when the run is finished.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import bcdl_jax
from experiments.io import checkpoint_storage as storage
from experiments.io import files, run_settings
from experiments.io.checkpoint_storage import Arrays
from experiments.runtime import devices
from experiments.runtime.errors import UserError, first_line

DIRECTORY = "checkpoints"
# In their order. Each phase has a training state of its own and starts from the result of the phase before it.
PHASES = ("pretrain", "train", "fine_tune")
_KEPT = 2
_WRITING = ".writing"
_STATE, _ABOUT, _MANIFEST, _FRAMES = "state", "about.json", "manifest.json", "frames"


@dataclasses.dataclass(frozen=True)
class Restored:
    """The content of a checkpoint.

    Attributes:
      state: The training state.
      complete: True if the checkpoint was written at the end of its phase.
      facts: The facts that the phase gave to ``Checkpoints.save``.
      frames: The frames of the pictures by epoch.
    """

    state: Any
    complete: bool
    facts: dict[str, Any]
    frames: dict[int, Arrays]


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      every: The number of epochs between two checkpoints; 0 for checkpoints after signals only.
      resumed: The number of times that the run was resumed.
      earlier_seconds: The training time of the earlier starts up to the resumed checkpoint, in seconds.
    """

    def __init__(self, out: Path, metrics: str, settings: Mapping[str, Any], every: int):
        """Reads and writes nothing yet.

        Args:
          out: The output directory of the run.
          metrics: The name of its metrics file.
          settings: The settings of the run, see ``run_settings.settings``.
          every: The attribute ``every``.
        """
        self.every, self.resumed, self.earlier_seconds = every, 0, 0.0
        self._directory, self._metrics = out.absolute() / DIRECTORY, out.absolute() / metrics
        self._settings = run_settings.as_stored(settings)
        self._start = time.perf_counter()

    def resume(self) -> bool:
        """Selects the newest undamaged checkpoint of the earlier starts and removes damaged ones.

        Returns:
          True if there is an undamaged checkpoint, else False.

        Raises:
          UserError: The run was started with other settings.
        """
        damage = {path: self._damage(path) for path in self._newest_first()}
        newest = next((path for path, found in damage.items() if not found), None)
        if newest is not None:
            about = _read_about(newest)
            if differences := run_settings.differences(about["settings"], self._settings):
                raise UserError(f"--resume cannot continue from {newest}, since {'; '.join(differences)}.")
            self.resumed, self.earlier_seconds = about["resumed"] + 1, about["seconds"]
            self._reset_metrics(newest)
        for path, found in damage.items():
            if found:
                print(f"warning: Checkpoint {path} is damaged ({found}) and is skipped.", file=sys.stderr)
                shutil.rmtree(path)
        return newest is not None

    def restore(self, phase: str, like: Any) -> Restored | None:
        """Reads the newest checkpoint of a phase. Every process must call it.

        Unless the phase is complete, the checkpoints of later phases are removed and the metrics file is reset.

        Args:
          phase: The phase, one of ``PHASES``.
          like: A state with the shapes of the restored one, on the devices of the result.

        Returns:
          The content of the checkpoint; None if the phase starts from the beginning.
        """
        if jax.process_count() == 1:
            return self._restore(phase, like)
        # Process 0 alone reads the files, since the others may not have them.
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
            self._remove_later(phase, about["frames"])
        if path is None:
            return None
        frames = {
            int(Path(name).stem.rpartition("-")[2]): storage.read_arrays(self._frames / name)
            for name in about["frames"]
        }
        return Restored(storage.read_state(path / _STATE, like), about["complete"], about["facts"], frames)

    def _remove_later(self, phase: str, kept_frames: Mapping[str, str]) -> None:
        """Removes the checkpoints of later phases and all frames of this phase but the kept ones, and resets the metrics file."""
        rank = PHASES.index(phase)
        for path in self._newest_first():
            if PHASES.index(_read_about(path)["phase"]) > rank:
                shutil.rmtree(path)
        self._reset_metrics(next(iter(self._newest_first()), None))
        for frame in list(self._frames.glob(f"{phase}-*.npz")):
            if frame.name not in kept_frames:
                frame.unlink()

    def save(
        self, phase: str, state: Any, *, facts: Mapping[str, Any], frames: Mapping[int, Arrays], complete: bool = False
    ) -> Path | None:
        """Writes a checkpoint. Every process must call it; process 0 writes.

        If that fails, on a full disk for example, a warning is printed and the earlier checkpoints stay.

        Args:
          phase: The phase, one of ``PHASES``.
          state: The training state of the phase, at full size.
          facts: Further values that the phase needs when it is resumed, as JSON values.
          frames: The frames of the pictures so far, by epoch.
          complete: True at the end of the phase, else False.

        Returns:
          The directory of the checkpoint; None if it could not be written or if this process does not write.
        """
        if jax.process_count() > 1:
            state = bcdl_jax.train.fetch(state)
        if not devices.is_writer():
            return None
        existing = self._newest_first()
        path = self._directory / f"{1 + (int(existing[0].name) if existing else 0):06d}"
        unfinished = self._directory / f"{_WRITING}{path.name}"
        about = {"phase": phase, "complete": complete, "settings": self._settings, "facts": facts}
        try:
            self._write(unfinished, about, state, frames)
            unfinished.rename(path)
            storage.sync(self._directory)
        except Exception as error:  # Orbax reports a full disk by errors of several types.
            shutil.rmtree(unfinished, ignore_errors=True)
            last = f"the last checkpoint is {existing[0].name}" if existing else "there is no checkpoint yet"
            print(
                f"warning: A checkpoint could not be written ({_reason(error)}); training continues, and {last}.",
                file=sys.stderr,
            )
            return None
        for old in [old for old in self._newest_first() if _read_about(old)["phase"] == phase][_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def _write(self, path: Path, about: Mapping[str, Any], state: Any, frames: Mapping[int, Arrays]) -> None:
        """Writes the files of a checkpoint into the directory ``path``, and its frames beside it."""
        for unfinished in _unfinished(self._directory):
            shutil.rmtree(unfinished)
        self._frames.mkdir(parents=True, exist_ok=True)
        frame_files = {epoch: self._frames / f"{about['phase']}-{epoch:04d}.npz" for epoch in frames}
        for epoch, file in frame_files.items():
            if not file.exists():
                files.write_arrays(file, frames[epoch])
        path.mkdir()
        storage.write_state(path / _STATE, state)
        about = {
            **about,
            "frames": {file.name: storage.file_checksum(file) for file in frame_files.values()},
            "resumed": self.resumed,
            "seconds": self.earlier_seconds + time.perf_counter() - self._start,
        }
        files.write_json(path / _ABOUT, about)
        if self._metrics.exists():
            shutil.copyfile(self._metrics, path / self._metrics.name)
        storage.sync(self._frames, path)
        files.write_json(path / _MANIFEST, storage.directory_checksums(path, _MANIFEST))
        storage.sync(path / _MANIFEST, path)

    def newest(self) -> Path:
        """The directory of the newest checkpoint."""
        return self._newest_first()[0]

    def make_directory(self) -> None:
        """Makes the directory of the checkpoints. It marks the run as unfinished even before the first checkpoint."""
        self._directory.mkdir()
        storage.sync(self._directory.parent)

    def remove(self) -> None:
        """Removes all checkpoints. The directory is renamed first, so that a process killed meanwhile leaves no unfinished run."""
        removed = self._directory.with_name(f".{DIRECTORY}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self._directory.exists():
            self._directory.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    @property
    def _frames(self) -> Path:
        return self._directory / _FRAMES

    def _newest_first(self) -> list[Path]:
        return _newest_first(self._directory)

    def _reset_metrics(self, checkpoint: Path | None) -> None:
        """Replaces the metrics file by the copy in a checkpoint; removes it if there is none."""
        copy = None if checkpoint is None else checkpoint / self._metrics.name
        if copy is None or not copy.exists():
            self._metrics.unlink(missing_ok=True)
            return
        content = copy.read_bytes()
        bcdl_jax.codec.write_atomically(self._metrics, lambda file: file.write(content))

    def _damage(self, path: Path) -> str:
        """The damaged files of a checkpoint, or the error in reading it; "" for an undamaged one."""
        try:
            expected = json.loads((path / _MANIFEST).read_text())
            found = storage.directory_checksums(path, _MANIFEST)
            damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if not damaged:
                frames = _read_about(path)["frames"]
                damaged = [
                    name for name, checksum in frames.items() if storage.file_checksum(self._frames / name) != checksum
                ]
            return ", ".join(damaged)
        except (OSError, ValueError, AttributeError) as error:
            return _reason(error)


def _newest_first(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.name.isdecimal()), reverse=True)


def _unfinished(directory: Path) -> list[Path]:
    return list(directory.glob(f"{_WRITING}*"))


def _read_about(path: Path) -> dict[str, Any]:
    return json.loads((path / _ABOUT).read_text())


def _reason(error: Exception) -> str:
    """The first line of an error's message. Orbax mentions a full disk only at the end of a page."""
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else first_line(error)


def are_in(out: str) -> bool:
    """Whether the output directory holds an unfinished run."""
    return (Path(out) / DIRECTORY).is_dir()


def being_written(out: Path) -> list[Path]:
    """The directories of the checkpoints that are being written in an output directory, or were when the process ended."""
    return _unfinished(out / DIRECTORY)


def describe_newest(out: Path) -> str | None:
    """The number, the phase and the step of the newest checkpoint in an output directory, in words; None if there is none."""
    newest = next(iter(_newest_first(out / DIRECTORY)), None)
    if newest is None:
        return None
    about = _read_about(newest)
    return f"checkpoint {newest.name} of {about['phase']} step {about['facts']['step']}"


def begin(
    out: str,
    settings: Mapping[str, Any],
    written: list[str],
    metrics: str,
    *,
    every: int,
    resume: bool,
    overwrite: bool,
) -> tuple[Path, Checkpoints]:
    """Prepares the output directory for a new or a resumed run. Prints which of the two it is if ``resume`` is True.

    Args:
      out: The output directory.
      settings: The settings of the run, see ``run_settings.settings``.
      written: Patterns of the files that a run writes, as in ``files.prepare_out``.
      metrics: The name of the metrics file, one of ``written``.
      every: The number of epochs between two checkpoints, as in ``Checkpoints``.
      resume: True to resume an unfinished run in ``out``, if there is one.
      overwrite: True to replace the files of an earlier run, False to refuse a directory that is not empty.

    Returns:
      The output directory and the checkpoints of the run.

    Raises:
      UserError: The directory cannot be used, or the run in it was started with other settings.
    """
    checkpoints = Checkpoints(Path(out), metrics, settings, every)
    unfinished = resume and are_in(out)
    if unfinished and checkpoints.resume():
        print(f"Resumes the run in {out} from {checkpoints.newest()}.", flush=True)
        # The resumed run writes these files again.
        files.remove(Path(out), [name for name in written if name != metrics])
        return Path(out), checkpoints
    if resume:
        print(f"There is no checkpoint in {out}; the run starts from the beginning.", flush=True)
    directory = files.prepare_out(out, overwrite or unfinished, written)
    checkpoints.remove()
    checkpoints.make_directory()
    return directory, checkpoints
