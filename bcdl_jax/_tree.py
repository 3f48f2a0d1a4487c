"""Trees of parameters: their layers, the names of layers and arrays, and values that are given by layer.

A layer keeps its parameters in one *node*, a pytree of its own type: a posterior, or a layer of integers. Layers are found by that type.
Each node class has two texts for error messages: ``layer_kind``, the plural name of its layers, and ``layer_source``, a sentence on their
origin.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

PyTree = Any
Function = TypeVar("Function", bound=Callable[..., Any])
NodeTypes = type[Any] | tuple[type[Any], ...]

# The name under which a layer stores its node among the parameters of its module. It is left out of the names of layers.
NODE_ENTRY = "posterior"


def map_layers(function: Callable[[Any], Any], params: PyTree, node_types: NodeTypes) -> PyTree:
    """Replaces every node of the given types by ``function(node)``; all other leaves stay as they are."""
    return map_named_layers(lambda _, node: function(node), params, node_types)


def map_named_layers(function: Callable[[str, Any], Any], params: PyTree, node_types: NodeTypes) -> PyTree:
    """Like ``map_layers``, with the layer's name as the first argument of ``function``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(layer_name(path), leaf) if isinstance(leaf, node_types) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, node_types),
    )


def plain_layers(
    function: Callable[[Any], dict[str, jax.Array]],
    params: PyTree,
    node_types: NodeTypes,
    other: Callable[[jax.Array], jax.Array] = lambda leaf: leaf,
) -> PyTree:
    """The tree of the plain twin: nodes of the given types become ``function(node)``, other leaves ``other(leaf)``.

    A node that is stored under ``NODE_ENTRY`` is merged into its module: the entries of ``function(node)`` stand beside the module's others.

    Raises:
      ValueError: A node is several layers, stacked.
    """
    for name, node in _layers_by_name(params, node_types).items():
        check_not_stacked(name, node)

    def is_layer(node: Any) -> bool:
        return isinstance(node, node_types) or (
            isinstance(node, Mapping) and isinstance(node.get(NODE_ENTRY), node_types)
        )

    def replace(node: Any) -> Any:
        if isinstance(node, node_types):
            return function(node)
        if isinstance(node, Mapping):
            others = {key: value for key, value in node.items() if key != NODE_ENTRY}
            return function(node[NODE_ENTRY]) | jax.tree.map(replace, others, is_leaf=is_layer)
        return other(node)

    return jax.tree.map(replace, params, is_leaf=is_layer)


def find_layers(params: PyTree, node_types: NodeTypes) -> dict[str, Any]:
    """All nodes of the given types by layer name, in the order of the tree, see ``layer_name``.

    Raises:
      ValueError: There is none, or a leaf of the tree is not an array.
    """
    check_arrays(params)
    found = _layers_by_name(params, node_types)
    if not found:
        nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=dataclasses.is_dataclass)
        others = [
            f"{layer_name(path)} is a {type(node).__name__}" for path, node in nodes if dataclasses.is_dataclass(node)
        ]
        top = ", ".join(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        more = f" ({', '.join(others)})" if others else ""
        types = node_types if isinstance(node_types, tuple) else (node_types,)
        raise ValueError(
            f"params holds no {' or '.join(kind.layer_kind for kind in types)}; it holds: {top or 'nothing'}{more}. "
            + " ".join(kind.layer_source for kind in types)
        )
    return found


def find_single_layers(params: PyTree, node_types: NodeTypes) -> dict[str, Any]:
    """``find_layers`` for functions that do not work on stacked layers. Raises ValueError for those, see ``check_not_stacked``."""
    found = find_layers(params, node_types)
    for name, node in found.items():
        check_not_stacked(name, node)
    return found


def check_not_stacked(name: str, node: Any) -> None:
    """Raises ValueError for a node of several layers: their arrays would broadcast against each other to wrong results."""
    mask = node.input_mask
    if getattr(mask, "ndim", 1) != 1:
        raise ValueError(
            f"{name} of params is several layers, stacked: its input_mask has shape {mask.shape}, where one axis is allowed. Params of many "
            "seeds, and layers under nn.vmap or nn.scan, must go through jax.vmap, or be taken apart by train.select_seed(params, index)."
        )


def _layers_by_name(params: PyTree, node_types: NodeTypes) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, node_types))
    return {layer_name(path): leaf for path, leaf in leaves if isinstance(leaf, node_types)}


def layer_name(path: tuple[Any, ...]) -> str:
    """The name of the layer whose node has this path: the path joined by "/", without ``NODE_ENTRY``.

    ``params["encoder"]["Dense_0"]["posterior"]`` is "encoder/Dense_0".
    """
    return module_name(path_name(path)) or "params"


def module_name(name: str) -> str:
    """The name of the module that stores a node or an array under this name: the name without ``NODE_ENTRY`` at its end."""
    return name.removesuffix(f"/{NODE_ENTRY}")


def path_name(path: tuple[Any, ...], separator: str = "/") -> str:
    """The path of an array within a tree, joined by a separator."""
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def array_names(paths: Sequence[tuple[Any, ...]], separator: str = "/") -> list[str]:
    """The names of the arrays at these paths, which are all paths of a params tree.

    A variable of an NNX State keeps its array as its only "value": such an array has the name of the variable.
    """
    within = collections.Counter(path[:length] for path in paths for length in range(len(path)))

    def name(path: tuple[Any, ...]) -> str:
        alone = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value") and within[path[:-1]] == 1
        return path_name(path[:-1] if alone else path, separator)

    return [name(path) for path in paths]


def named_arrays(tree: PyTree, separator: str = "/") -> list[tuple[str, Any]]:
    """The arrays of a tree with their names, in the order of its leaves. Raises ValueError for a leaf that is not an array."""
    check_arrays(tree)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return list(zip(array_names([path for path, _ in flat], separator), [leaf for _, leaf in flat], strict=True))


def values_by_layer(values: Any, names: Iterable[str], argument: str) -> dict[str, Any]:
    """One value for each layer, from one value for all of them or a mapping from layer names.

    Args:
      values: The value or the mapping.
      names: The names of the layers.
      argument: The name of the caller's argument, for errors.

    Raises:
      ValueError: The mapping names an unknown layer, or lacks one.
    """
    names = list(names)
    if not isinstance(values, Mapping):
        return dict.fromkeys(names, values)
    check_layers_exist(values, names, argument)
    for name in names:
        if name not in values:
            raise ValueError(f"{argument} has no value for layer {name}; the layers are {', '.join(names)}.")
    return dict(values)


def check_layers_exist(given: Iterable[str], names: Iterable[str], argument: str) -> None:
    """Raises ValueError if one of the ``given`` layer names is not among ``names``."""
    names = list(names)
    for name in given:
        if name not in names:
            raise ValueError(f"{argument} names layer {name}, which does not exist; the layers are {', '.join(names)}.")


def check_arrays(tree: PyTree, argument: str = "params") -> None:
    """Raises ValueError if a leaf of the tree is neither an array nor a number, such as a function of an Equinox module."""
    if all(map(_is_array, jax.tree.leaves(tree))):
        return
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path, leaf = next((path, leaf) for path, leaf in leaves if not _is_array(leaf))
    raise ValueError(
        f"{argument} {f'holds at {path_name(path)}' if path else 'is'} a {type(leaf).__name__}; it must be a tree of arrays. For an Equinox "
        "module, give the arrays of eqx.partition(module, eqx.is_array); for an NNX module, give the params of nnx.split(module, nnx.Param, ...)."
    )


def takes_arrays(function: Function) -> Function:
    """Makes a function call ``check_arrays`` on its first argument.

    Apply this decorator outside ``jax.jit``: the error of ``jax.jit`` does not explain the cure.
    """

    @functools.wraps(function)
    def checked(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        check_arrays(params)
        return function(params, *args, **kwargs)

    return checked  # type: ignore[return-value]


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, bool | int | float | complex):
        return True
    dtype = getattr(leaf, "dtype", None)
    # The kinds of NumPy's types that hold objects, texts and times.
    return dtype is not None and hasattr(leaf, "shape") and not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
