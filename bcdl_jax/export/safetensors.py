"""Weights for other frameworks: names and arrays as safetensors, in the layout of Flax or of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax._tree import array_names, is_key
from bcdl_jax.compression.plain_twin import mean_weights
from bcdl_jax.compression.quantization import QuantizedLayer
from bcdl_jax.graph.program import Program, Step, data_dependent, trace
from bcdl_jax.priors.posterior import Posterior

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
_PRODUCTS = frozenset(["conv_general_dilated", "dot_general"])
_MOVES = frozenset(["copy", "expand_dims", "gather", "reshape", "rev", "slice", "squeeze", "transpose"])


def export_safetensors(
    path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes a tree of arrays under their names. Needs ``safetensors`` (``pip install -e '.[export]'``).

    Args:
      path: the file. It is written under a temporary name and then renamed.
      params: a tree of arrays, such as the small params of ``shrink`` or the result of ``torch_state_dict``. Variational and quantised layers
        are written as their mean weights. The name of an array is its path, joined by dots.
      metadata: what else to store in the file's header.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: two arrays have the same name, one does not hold plain numbers, or metadata hold something other than strings.
      ModuleNotFoundError: safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("export_safetensors needs safetensors: pip install -e '.[export]'.") from error
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
      ValueError: params hold variational or quantised layers; a kernel is used in another way than by a dense layer or a convolution
        (a transposed one, say); something between a flatten and a dense layer keeps the order of its inputs from being followed;
        two arrays get the same name.
    """
    for layer in jax.tree.leaves(params, is_leaf=_is_layer):
        if _is_layer(layer):
            raise ValueError(f"params hold a {type(layer).__name__}; they must be arrays, as of mean_weights.")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    program = trace(apply, params, *inputs)
    values = [
        np.asarray(value) if not is_key(value) else value
        for value in program.evaluate(*jax.tree.leaves((params, *inputs)))
    ]
    users = _users(program)
    order = _Order(program, values, len(jax.tree.leaves(params)))
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
        elif step is not None and _is_dense(step, array):
            weight = array.T if step.params["dimension_numbers"][0][1] == (0,) else array
            entries = _with_channels_first(weight, order.of_inputs(step.inputs[0], path))
        elif name == "kernel" and array.ndim > 1:
            raise ValueError(
                f"{path} of shape {array.shape} is not used as the kernel of a dense layer or a convolution as it is, so there "
                "is no PyTorch layout for it."
            )
        for key, value in entries.items():
            full = f"{prefix}.{key}" if prefix else key
            if full in state:
                raise ValueError(f"{path} and another array would both be called {full}.")
            state[full] = np.array(value, order="C")
    return state


def _is_layer(node: Any) -> bool:
    return isinstance(node, Posterior | QuantizedLayer)


def _named(tree: PyTree, separator: str) -> dict[str, np.ndarray]:
    named: dict[str, np.ndarray] = {}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for name, leaf in zip(array_names(paths, separator), jax.tree.leaves(tree), strict=True):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.extended):
            raise ValueError(f"{name} is of type {leaf.dtype}; only plain numbers can be written.")
        if name in named:
            raise ValueError(f"Two arrays are called {name}.")
        named[name] = np.array(leaf, order="C")
    return named


def _users(program: Program) -> dict[int, Step]:
    """By number of a value: the product that reads it as its second operand, directly or converted to another type."""
    users: dict[int, Step] = {}
    for step in reversed(program.steps):
        if step.name in _PRODUCTS:
            users[step.inputs[1]] = step
        elif step.name in ("convert_element_type", "copy") and step.outputs[0] in users:
            users[step.inputs[0]] = users[step.outputs[0]]
    return users


def _is_dense(step: Step, kernel: np.ndarray) -> bool:
    (_, contracted), batch = step.params["dimension_numbers"]
    return kernel.ndim == 2 and len(contracted) == 1 and not any(batch)


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


class _Order:
    """Follows the order of flattened values through a program.

    Of a value it knows the *origin*, the last value before it whose elements it only moves or changes one by one, and the *places*: which
    element of an example's origin each of its elements comes from.
    """

    def __init__(self, program: Program, values: list[Any], num_params: int):
        self._values = values
        self._producers = {output: step for step in program.steps for output in step.outputs}
        self._depends = data_dependent(program, num_params)
        self._known: dict[int, tuple[int, np.ndarray] | None] = {}

    def of_inputs(self, number: int, path: str) -> tuple[np.ndarray, tuple[int, ...]] | None:
        """Places of a dense layer's inputs [in], and the shape [..., channels] they were flattened from; None if they were not.

        Raises:
          ValueError: they were, but the order is lost.
        """
        found = self._follow(number)
        if found is not None and not self._is_flattened(found):
            return None
        if found is None or self._values[number].ndim != 2:
            raise ValueError(
                f"{path} reads values that were flattened and then mixed, scaled or rearranged, so their order cannot be followed; "
                "PyTorch has another one."
            )
        origin, places = found
        return places[0], self._values[origin].shape[1:]

    def _is_flattened(self, found: tuple[int, np.ndarray]) -> bool:
        """Whether the last axis runs over more than one position of channels-last values."""
        origin, places = found
        shape = self._values[origin].shape
        if len(shape) < 3 or places.ndim < 2 or not places.size:
            return False
        positions = (places // shape[-1]).reshape(-1, places.shape[-1])
        return bool((positions != positions[:, :1]).any())

    def _follow(self, number: int) -> tuple[int, np.ndarray] | None:
        if number not in self._known:
            self._known[number] = self._found(number)
        return self._known[number]

    def _found(self, number: int) -> tuple[int, np.ndarray] | None:
        value = self._values[number]
        own = (
            number,
            np.broadcast_to(np.arange(value[:1].size, dtype=np.int32).reshape(1, *value.shape[1:]), value.shape),
        )
        step = self._producers.get(number)
        if step is None or value.ndim < 1:
            return own
        sources = [each for each in step.inputs if each in self._depends]
        if step.name in _MOVES and sources[:1] == [step.inputs[0]]:
            before = self._follow(step.inputs[0])
            if before is None:
                return None
            others = (self._values[each] for each in step.inputs[1:])
            return before[0], np.asarray(step.bind(before[1], *others)[0])
        if step.name in _PRODUCTS:  # they may read flattened values: what they make has an order of its own
            return own
        found = [self._follow(each) for each in sources]
        first = found[0] if found else None
        if first is None:
            return None if found else own
        flattened = any(each is None or self._is_flattened(each) for each in found)
        scaled = any(self._values[each].size > 1 for each in step.inputs if each not in self._depends)
        same = all(each is not None and each[0] == first[0] and np.array_equal(each[1], first[1]) for each in found)
        if step.elementwise and same and not (flattened and scaled):
            return first
        return None if flattened else own
