"""Training data of ``fit``: arrays, or batches from a function of the epoch or from an iterable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bcdl_jax._tree import PyTree
from bcdl_jax.train.batches import count_examples, steps_per_epoch
from bcdl_jax.train.checkpoints import checksum
from bcdl_jax.train.loop import make_train_loop, sums_before
from bcdl_jax.train.mesh import DATA, jit_step, place_data
from bcdl_jax.train.state import Metrics, TrainState, TrainStep

# Inputs and targets, trees of arrays [examples, ...].
Batch = tuple[PyTree, PyTree]
# (state, number of steps) -> the state after these steps, and the sums of their metrics. The steps do not cross the end of an epoch.
Advance = Callable[[TrainState, int], tuple[TrainState, Metrics]]


class Feed(Protocol):
    """Training or validation data."""

    @property
    def steps(self) -> int:
        """The number of training steps of an epoch."""
        ...

    @property
    def description(self) -> str:
        """A text that differs for different data, as far as is known."""
        ...

    def check_resumable(self) -> None:
        """Raises ValueError if training cannot continue in the middle of an epoch of another process."""
        ...

    def batches(self) -> Iterator[Batch]:
        """All examples in some batches."""
        ...

    def trainer(self, step: TrainStep) -> Advance:
        """A function that takes training steps. It donates the buffers of the state."""
        ...

    def position(self) -> Any:
        """The position in the data after the last training step, a JSON value; None if it follows from the number of the step."""
        ...

    def go_to(self, position: Any) -> None:
        """Lets the next training step continue from a position of another process."""
        ...


class ArrayFeed:
    """Data in arrays. Each epoch takes the examples in another order, which follows from the key of the state."""

    def __init__(self, data: Batch, batch_size: int, mesh: Mesh | None) -> None:
        """The arguments are the arrays, the number of examples of a training step, and the devices of training.

        On a mesh, training leaves out the last examples if the devices cannot share them equally.
        """
        self._data: Batch = jax.tree.map(jnp.asarray, data)
        self._mesh, self._shards = mesh, _shards(mesh)
        self._count = count_examples(data)
        size = min(batch_size, self._count)
        if size < self._shards:
            raise ValueError(
                f"A training step has {size} examples; it must have one for each of the {self._shards} devices."
            )
        self._batch_size = size - size % self._shards

    @property
    def steps(self) -> int:
        return steps_per_epoch(self._count - self._count % self._shards, self._batch_size, self._shards)

    @property
    def description(self) -> str:
        return f"arrays {checksum(self._data)} in batches of {self._batch_size} on {self._shards} devices"

    def check_resumable(self) -> None:
        pass

    def position(self) -> None:
        return None

    def go_to(self, position: Any) -> None:
        pass

    def batches(self) -> Iterator[Batch]:
        # In random order, since the examples may be sorted by class.
        size, order = 4 * self._batch_size, np.random.default_rng(0).permutation(self._count)
        for start in range(0, self._count, size):
            rows = order[start : start + size]
            yield jax.tree.map(lambda array, rows=rows: array[rows], self._data)

    def trainer(self, step: TrainStep) -> Advance:
        loop = _compiled(make_train_loop(step, batch_size=self._batch_size, shards=self._shards))
        data = self._data
        if self._mesh is not None:
            data = place_data(
                jax.tree.map(lambda array: array[: self._count - self._count % self._shards], data), self._mesh
            )

        def advance(state: TrainState, count: int) -> tuple[TrainState, Metrics]:
            before = sums_before(state, self.steps)
            state, _ = loop(state, data, count)
            return state, {name: total - before[name] for name, total in state.metric_sums.items()}

        return advance


class BatchFeed:
    """Data in batches. Training leaves out a smaller batch at the end of an epoch."""

    def __init__(
        self, name: str, epoch: Callable[[int], Iterable[Batch]], mesh: Mesh | None, is_repeatable: bool
    ) -> None:
        """Goes through the batches of an epoch once, to count them.

        Args:
          name: The name of the argument, for errors.
          epoch: A function from the number of an epoch to its batches.
          mesh: The devices of training, or None for one.
          is_repeatable: True if an epoch has the same batches in each process.

        Raises:
          ValueError: There is no batch, a batch has arrays of other shapes than the first one, or two calls return the same iterator.
        """
        self._name, self._epoch, self._mesh, self._is_repeatable = name, epoch, mesh, is_repeatable
        one, two = epoch(0), epoch(0)
        if one is two and isinstance(one, Iterator):
            raise ValueError(f"{name} returns the same iterator at two calls; it must return new batches at each call.")
        first = next(iter(one), None)
        if first is None:
            raise ValueError(f"{name} ends at once; each epoch must have at least one batch.")
        checked_pair(name, first)
        self._shapes = _shapes(first)
        self._steps = sum(1 for _ in self._whole(iter(epoch(0))))
        self._reader: _Reader | None = None

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def description(self) -> str:
        return f"{self._steps} batches of shapes {self._shapes} on {_shards(self._mesh)} devices"

    def check_resumable(self) -> None:
        if not (self._is_repeatable or _has_position(iter(self._epoch(0)))):
            raise ValueError(
                f"{self._name} is an iterable whose position cannot be saved. With checkpoints, it must be arrays, a list of batches, a function "
                "from the number of an epoch to its batches, or an iterable whose iterators have get_state and set_state."
            )

    def position(self) -> Any:
        if self._is_repeatable or self._reader is None:
            return None
        return _as_json(self._reader.iterator.get_state())

    def go_to(self, position: Any) -> None:
        if position is not None:
            iterator: Any = iter(self._epoch(0))
            iterator.set_state(_from_json(position))
            self._reader = _Reader(iterator, self._whole(iterator), None)

    def batches(self) -> Iterator[Batch]:
        return (checked_pair(self._name, batch) for batch in self._epoch(0))

    def trainer(self, step: TrainStep) -> Advance:
        take = _compiled(step)

        def advance(state: TrainState, count: int) -> tuple[TrainState, Metrics]:
            number, sums = int(state.step), dict.fromkeys(state.metric_sums, jnp.zeros(()))
            batches = self._batches_from(number)
            for _ in range(count):
                batch = next(batches, None)
                if batch is None:
                    raise ValueError(
                        f"{self._name} has fewer than {self._steps} batches in epoch {number // self._steps}, unlike in its first one."
                    )
                placed = batch if self._mesh is None else place_data(batch, self._mesh)
                state, metrics = take(state, placed)
                sums = {name: total + metrics[name] for name, total in sums.items()}
            self._reader = dataclasses.replace(self._reader, step=number + count)  # type: ignore[type-var]
            return state, sums

        return advance

    def _batches_from(self, number: int) -> Iterator[Batch]:
        """The batches from this training step to the end of its epoch."""
        epoch, place = divmod(number, self._steps)
        reader = self._reader
        if place == 0 or reader is None or reader.step not in (None, number):
            iterator = iter(self._epoch(epoch))
            reader = _Reader(iterator, self._whole(iterator), number)
            for _ in range(place):
                next(reader.batches, None)
        self._reader = reader
        return reader.batches

    def _whole(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches without smaller ones."""
        for batch in batches:
            if _shapes(batch) == self._shapes:
                yield batch
            elif [shape[1:] for shape in _shapes(batch)] != [shape[1:] for shape in self._shapes]:
                raise ValueError(
                    f"{self._name} has a batch with arrays of shapes {_shapes(batch)}; the first one has {self._shapes}."
                )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The reading of an epoch.

    Attributes:
      iterator: The iterator of the user.
      batches: Its whole batches that are left.
      step: The number of the next training step; None for the step at which another process stopped.
    """

    iterator: Any
    batches: Iterator[Batch]
    step: int | None


def _shards(mesh: Mesh | None) -> int:
    """The number of devices over which the examples of a step are spread."""
    return 1 if mesh is None else mesh.shape[DATA]


def _compiled(function: Callable[..., tuple[TrainState, Metrics]]) -> Callable[..., tuple[TrainState, Metrics]]:
    """A step or a loop, compiled at its first call for the devices of its state."""
    compiled: list[Callable[..., tuple[TrainState, Metrics]]] = []

    def call(state: TrainState, *arguments: Any) -> tuple[TrainState, Metrics]:
        if not compiled:
            compiled.append(jit_step(function, state))
        return compiled[0](state, *arguments)

    return call


def _has_position(iterator: Any) -> bool:
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def _as_json(position: Any) -> Any:
    return {"bytes": position.hex()} if isinstance(position, bytes) else {"value": position}


def _from_json(position: dict[str, Any]) -> Any:
    return bytes.fromhex(position["bytes"]) if "bytes" in position else position["value"]


def make_feed(name: str, data: Any, batch_size: int, mesh: Mesh | None = None) -> Feed:
    """The feed of an argument of ``fit``.

    Args:
      name: The name of the argument, for errors.
      data: A pair of inputs and targets in arrays, a function from the number of an epoch to its batches, or an iterable of batches that can
        be iterated again for each epoch.
      batch_size: The number of examples of a training step, for arrays.
      mesh: The devices of training, or None for one.

    Raises:
      ValueError: The data have another form, or their arrays do not fit together.
    """
    if callable(data):
        return BatchFeed(name, data, mesh, is_repeatable=True)
    if isinstance(data, tuple):
        return ArrayFeed(checked_pair(name, data), batch_size, mesh)
    if isinstance(data, Iterable) and not isinstance(data, Iterator | dict | np.ndarray | jax.Array):
        return BatchFeed(name, lambda epoch: data, mesh, is_repeatable=isinstance(data, Sequence))
    more = (
        " An iterator ends after one epoch: pass a function from the number of an epoch to its batches."
        if isinstance(data, Iterator)
        else ""
    )
    raise ValueError(
        f"{name} is a {type(data).__name__}; it must be a pair of inputs and targets, a function from the number of an epoch to such pairs, or "
        f"an iterable of them.{more}"
    )


def checked_pair(name: str, batch: Any) -> Batch:
    """The pair of inputs and targets. Raises ValueError for another form, or arrays of different lengths."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise ValueError(f"{name} is or holds a {type(batch).__name__}; it must be a pair of inputs and targets.")
    count_examples(tuple(batch))
    return batch[0], batch[1]


def first_examples(batch: Batch, count: int) -> Batch:
    """The first examples of a batch."""
    return jax.tree.map(lambda array: array[:count], batch)


def some_batches(feed: Feed, examples: int) -> list[Batch]:
    """The first batches of a feed, with this number of examples if it has as many."""
    chosen, count = list[Batch](), 0
    for batch in feed.batches():
        batch = first_examples(batch, examples - count)
        chosen.append(batch)
        count += count_examples(batch)
        if count >= examples:
            break
    return chosen


def _shapes(batch: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
