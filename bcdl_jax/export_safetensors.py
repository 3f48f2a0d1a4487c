"""Weights for other frameworks: names and arrays as safetensors, in the layout of Flax or of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bcdl_jax.atomic_file import write_atomically
from bcdl_jax.posterior import Posterior
from bcdl_jax.precision import QuantizedLayer
from bcdl_jax.program import Program, Step, trace
from bcdl_jax.trained import mean_weights

PyTree = Any

# Collections of Flax variables, which PyTorch's names do not have, and what PyTorch calls the parameters of its layers.
_COLLECTIONS = ("params", "batch_stats")
_TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Primitives that only move numbers from place to place: the first operand is moved, the others say where.
_MOVES = frozenset(["copy", "expand_dims", "gather", "reshape", "rev", "slice", "squeeze", "transpose"])


def export_safetensors(
    path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes a tree of arrays under their names. Needs ``safetensors`` (``pip install 'bcdl-jax[export]'``).

    Args:
      path: the file. It is written under a temporary name and then renamed.
      params: a tree of arrays, such as the small params of ``shrink`` or the result of ``torch_state_dict``. Variational and quantised layers
        are written as their mean weights. The name of an array is its path, joined by dots.
      metadata: what else to store in the file's header.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: two arrays have the same name, or metadata hold something other than strings.
    """
    from safetensors.numpy import save  # optional

    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata has {key!r}: {value!r}; both must be strings.")
    data = save(_named(mean_weights(params), "."), dict(metadata or {}))
    write_atomically(path, data)
    return len(data)


def torch_state_dict(apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> dict[str, np.ndarray]:
    """The params of a network of Flax layers, as the same layers of PyTorch hold them.

    Kernels become ``weight`` [out, in] or [out, in, window], a norm's scale ``weight`` and its averages ``running_mean`` and
    ``running_var``. PyTorch has the channels first: where a dense layer reads flattened channels-last values, the columns of its
    weight are brought to PyTorch's order. If it reads some of them only (a shrunk network may), the array ``<layer>.input_indices`` says which:
    ``linear(torch.flatten(x, 1)[:, input_indices])``.

    Args:
      apply: ``apply(params, *inputs)``, such as the small function of ``shrink``, on plain layers. It is traced, to see how a kernel is used.
      params: its params; arrays only (``mean_weights`` makes them from variational or quantised layers).
      example_inputs: a tuple of inputs, or a single array, images with the channels last.

    Returns:
      Arrays by name, for ``load_state_dict`` or ``export_safetensors``. Names are paths joined by dots, without Flax's collections.

    Raises:
      ValueError: params hold variational or quantised layers; a kernel belongs to a transposed convolution, which PyTorch stores
        in another way; two arrays get the same name.
    """
    for layer in jax.tree.leaves(params, is_leaf=_is_layer):
        if _is_layer(layer):
            raise ValueError(f"params hold a {type(layer).__name__}; they must be arrays, as of mean_weights.")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    program = trace(apply, params, *inputs)
    values = [
        np.asarray(value) if not _is_key(value) else value
        for value in program.evaluate(*jax.tree.leaves((params, *inputs)))
    ]
    users = _users(program)
    depends = _data_dependent(program, len(jax.tree.leaves(params)))
    state: dict[str, np.ndarray] = {}
    for number, (path, leaf) in zip(program.inputs, _named(params, "/").items(), strict=False):
        *parents, name = path.split("/")
        if parents and parents[0] in _COLLECTIONS:
            del parents[0]
        prefix = ".".join(parents)
        array = np.asarray(leaf)
        step = users.get(number)
        entries = {_TORCH_NAMES.get(name, name): array}
        if step is not None and step.name == "conv_general_dilated":
            entries = {"weight": _convolution_weight(step, array, path)}
        elif step is not None and array.ndim == 2:
            (contracted,) = step.params["dimension_numbers"][0][1]
            weight = array.T if contracted == 0 else array
            entries = _with_channels_first(weight, _flattened_places(program, values, depends, step.inputs[0]))
        for key, value in entries.items():
            full = f"{prefix}.{key}" if prefix else key
            if full in state:
                raise ValueError(f"{path} and another array would both be called {full}.")
            state[full] = np.array(value, order="C")
    return state


def _is_layer(node: Any) -> bool:
    return isinstance(node, Posterior | QuantizedLayer)


def _is_key(value: Any) -> bool:
    return jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _named(tree: PyTree, separator: str) -> dict[str, np.ndarray]:
    named: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=separator)
        if name in named:
            raise ValueError(f"Two arrays are called {name}.")
        named[name] = np.array(leaf, order="C")
    return named


def _users(program: Program) -> dict[int, Step]:
    """By number of a value: the product that reads it as its second operand, directly or converted to another type."""
    users: dict[int, Step] = {}
    for step in reversed(program.steps):
        if step.name in ("dot_general", "conv_general_dilated"):
            users[step.inputs[1]] = step
        elif step.name in ("convert_element_type", "copy") and step.outputs[0] in users:
            users[step.inputs[0]] = users[step.outputs[0]]
    return users


def _convolution_weight(step: Step, kernel: np.ndarray, path: str) -> np.ndarray:
    if {*step.params["lhs_dilation"]} != {1}:
        raise ValueError(f"{path} belongs to a transposed convolution, for which there is no PyTorch layout here.")
    return kernel.transpose(step.params["dimension_numbers"].rhs_spec)


def _with_channels_first(
    weight: np.ndarray, flattened: tuple[np.ndarray, tuple[int, ...]] | None
) -> dict[str, np.ndarray]:
    """A dense layer's weight [out, in] with its columns in the order of channels-first values, and which of them it reads if not all."""
    if flattened is None:
        return {"weight": weight}
    places, shape = flattened
    *window, channel = np.unravel_index(places, shape)
    first = np.ravel_multi_index((channel, *window), (shape[-1], *shape[:-1]))
    order = np.argsort(first)
    entries = {"weight": weight[:, order]}
    if len(places) != np.prod(shape):
        entries["input_indices"] = first[order].astype(np.int64)
    return entries


def _flattened_places(
    program: Program, values: list[Any], depends: set[int], number: int
) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """Where the inputs of a dense layer stand in the channels-last values they were flattened from.

    Returns the places in the flattened values, and their shape [..., channels] without the batch; None if nothing was flattened.
    """
    if values[number].ndim != 2:
        return None
    producers = {output: step for step in program.steps for output in step.outputs}
    moves: list[Step] = []
    while number in producers:
        step = producers[number]
        if step.name in _MOVES:
            moves.append(step)
            number = step.inputs[0]
        elif step.elementwise and len(sources := [each for each in step.inputs if each in depends]) == 1:
            number = sources[0]
        else:
            break
    shape = values[number].shape
    if len(shape) < 3:
        return None
    places = np.broadcast_to(np.arange(values[number][0].size, dtype=np.int32).reshape(1, *shape[1:]), shape)
    for step in reversed(moves):
        places = np.asarray(step.bind(places, *(values[each] for each in step.inputs[1:]))[0])
    return places[0], shape[1:]


def _data_dependent(program: Program, num_params: int) -> set[int]:
    """Numbers of the values that depend on the inputs, which follow the params."""
    depends = set(program.inputs[num_params:])
    for step in program.steps:
        if depends & set(step.inputs):
            depends |= set(step.outputs)
    return depends
