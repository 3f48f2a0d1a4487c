"""The checks of one public model: ``shrink``, its small function at several batch sizes, all exports, ``save`` and ``load``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax
from experiments.checks.differences import relative_difference
from experiments.checks.public_models.model import EXAMPLES, PublicModel, quick_jit, with_zeros

BATCHES = (1, 2, 5)
OK = "ok"


class ModelError(Exception):
    """A model that does not run, whatever the library does."""


class DifferenceError(Exception):
    """A result that differs from the one of the whole network."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    Attributes:
      text: The text for the table, "ok" or one sentence.
      failed: True if something else was computed, or an error is not one of those that the function documents.
    """

    text: str
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of all checks of one model.

    Attributes:
      bytes: The size of the params before and after shrinking.
      multiply_adds: The multiply-adds before and after shrinking.
      seconds: The time that ``shrink`` took.
      difference: The largest difference of the small function's outputs at any batch, relative to the largest output.
      batches: The batch sizes at which the outputs are the same.
      outcomes: The outcomes by the name of the check.
    """

    bytes: tuple[int, int] | None = None
    multiply_adds: tuple[int, int] | None = None
    seconds: float = 0.0
    difference: float = 0.0
    batches: tuple[int, ...] = ()
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(outcome.failed for outcome in self.outcomes.values())


@dataclasses.dataclass(frozen=True)
class Small:
    """A shrunk network, and the whole network's outputs that it must compute.

    Attributes:
      apply: The small function.
      params: The small params.
      whole_params: The params of the whole network.
      inputs: The inputs by batch size.
      outputs: The outputs of the whole network by batch size, as lists of arrays.
      tolerance: The largest allowed difference of outputs, relative to the largest output.
      is_flax: A flag for models of Flax layers.
    """

    apply: Callable[..., Any]
    params: Any
    whole_params: Any
    inputs: dict[int, tuple[Any, ...]]
    outputs: dict[int, list[np.ndarray]]
    tolerance: float
    is_flax: bool

    def assert_same(self, name: str, count: int, found: list[np.ndarray]) -> None:
        """Raises DifferenceError if the outputs that ``name`` computes at a batch size are not those of the whole network."""
        difference = relative_difference(found, self.outputs[count])
        if not difference <= self.tolerance:
            raise DifferenceError(f"{name} computes other outputs at batch {count}: they differ by {difference:.1e}.")


def check_model(model: PublicModel, own_choice: bool) -> Result:
    """Runs all checks of a model.

    Args:
      model: The model.
      own_choice: The argument of ``with_zeros``.

    Raises:
      ModelError: The model does not run.
    """
    params = with_zeros(model, own_choice)
    inputs = {count: _resized(model.inputs, count) for count in BATCHES}
    try:
        outputs = {count: _leaves(quick_jit(model.apply)(params, *each)) for count, each in inputs.items()}
    except Exception as error:
        raise ModelError(f"it does not run: {type(error).__name__}: {_sentence(error)}") from error
    if not all(np.isfinite(array).all() for arrays in outputs.values() for array in arrays):
        raise ModelError("its outputs are not finite.")
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            small_apply, small_params, report = bcdl_jax.shrink(model.apply, params, model.inputs)
    except Exception as error:  # No error of shrink is expected here.
        return Result(outcomes={"shrink": Outcome(f"{type(error).__name__}: {_sentence(error)}", failed=True)})
    seconds = time.perf_counter() - start
    small = Small(small_apply, small_params, params, inputs, outputs, model.tolerance, model.is_flax)

    outcomes, worked, largest = {"shrink": Outcome(OK)}, [], 0.0
    for count in BATCHES:
        outcome, difference = _check_batch(small, count)
        if outcome.text == OK:
            worked.append(count)
        else:
            outcomes[f"batch {count}"] = outcome
        largest = max(largest, difference)
    with tempfile.TemporaryDirectory() as directory:
        for name, (check, refusals) in CHECKS.items():
            outcomes[name] = _attempt(check, refusals, small, Path(directory))
    return Result(report.bytes, report.multiply_adds, seconds, largest, tuple(worked), outcomes)


def _resized(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return jax.tree.map(lambda leaf: jnp.take(leaf, np.arange(count) % EXAMPLES, axis=0), inputs)


def _leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _check_batch(small: Small, count: int) -> tuple[Outcome, float]:
    """The outcome of the small function at a batch size, and the relative difference of its outputs."""
    try:
        found = _leaves(quick_jit(small.apply)(small.params, *small.inputs[count]))
    except ValueError as error:  # The documented refusal of a batch size.
        return Outcome(_sentence(error)), 0.0
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {_sentence(error)}", failed=True), 0.0
    difference = relative_difference(found, small.outputs[count])
    if not difference <= small.tolerance:
        return Outcome(f"The outputs at batch {count} differ by {difference:.1e}.", failed=True), difference
    return Outcome(OK), difference


def _attempt(
    check: Callable[[Small, Path], str | None], refusals: tuple[type[Exception], ...], small: Small, directory: Path
) -> Outcome:
    try:
        return Outcome(check(small, directory) or OK)
    except DifferenceError as error:
        return Outcome(str(error), failed=True)
    except refusals as error:
        return Outcome(_sentence(error))
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {_sentence(error)}", failed=True)


def _sentence(error: Exception) -> str:
    """The first sentence of an error's message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0].rstrip(".")[:250] + "."


def _onnx(small: Small, directory: Path) -> None:
    import onnxruntime

    path = directory / "net.onnx"
    bcdl_jax.export_onnx(path, small.apply, small.params, small.inputs[BATCHES[-1]])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count, inputs in small.inputs.items():
        feed = {f"input_{place}": np.asarray(each) for place, each in enumerate(inputs)}
        small.assert_same("The ONNX file", count, session.run(None, feed))


def _stablehlo(small: Small, directory: Path) -> None:
    path = directory / "net.stablehlo"
    bcdl_jax.export_stablehlo(path, small.apply, small.params, small.inputs[BATCHES[-1]])
    run = quick_jit(bcdl_jax.load_stablehlo(path))
    for count, inputs in small.inputs.items():
        small.assert_same("The StableHLO file", count, _leaves(run(*inputs)))


def _safetensors(small: Small, directory: Path) -> None:
    from safetensors.numpy import load_file

    path = directory / "net.safetensors"
    bcdl_jax.export_safetensors(path, small.params)
    contents = [
        sorted((array.shape, array.dtype.name, array.tobytes()) for array in arrays)
        for arrays in (load_file(path).values(), _leaves(small.params))
    ]
    if contents[0] != contents[1]:
        raise DifferenceError("The safetensors file holds other arrays than the params.")


def _torch(small: Small, directory: Path) -> str | None:
    if not small.is_flax:
        return "not a model of Flax"
    state = bcdl_jax.export.torch_state_dict(small.apply, small.params, small.inputs[BATCHES[-1]])
    arrays = [array for name, array in state.items() if not name.endswith(".input_indices")]
    found, expected = (
        {*np.concatenate([np.ravel(array) for array in each])} for each in (arrays, _leaves(small.whole_params))
    )
    # A shrunk grouped convolution has groups of equal sizes, which may hold weights of the whole network.
    if found - expected or len(arrays) < sum(array.size > 0 for array in _leaves(small.params)):
        raise DifferenceError("The dictionary for PyTorch holds other values than the params.")
    return None


def _save_and_load(small: Small, directory: Path) -> None:
    path = directory / "net.bcdl"
    bcdl_jax.save(path, small.params)
    loaded = bcdl_jax.load(path, like=small.params)
    try:
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), loaded, small.params)
    except ValueError as error:
        raise DifferenceError(f"The loaded params have another structure: {_sentence(error)}") from error
    if not all(jax.tree.leaves(same)):
        raise DifferenceError("The loaded params differ from the saved params.")
    count = BATCHES[-1]
    found = _leaves(quick_jit(small.apply)(loaded, *small.inputs[count]))
    small.assert_same("The loaded network", count, found)


# The checks after shrinking, each with the errors by which the function refuses a network. No network may fail to be saved.
CHECKS: dict[str, tuple[Callable[[Small, Path], str | None], tuple[type[Exception], ...]]] = {
    "onnx": (_onnx, (NotImplementedError, ValueError, ModuleNotFoundError)),
    "stablehlo": (_stablehlo, (ValueError, ModuleNotFoundError)),
    "safetensors": (_safetensors, (ValueError, ModuleNotFoundError)),
    "torch": (_torch, (ValueError,)),
    "save/load": (_save_and_load, ()),
}
