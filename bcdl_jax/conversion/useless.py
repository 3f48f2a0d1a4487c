"""Finds the inputs and outputs of converted layers that pruning makes useless, by the flow of zeros through the traced network.

A weight or bias is useful if it is kept, and a result of the network depends on it: the data of a useful weight may differ from 0, and its
product reaches a result. An input is useful if one of its weights is. An output is useful if one of its weights is, or its bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bcdl_jax._arrays import is_kept
from bcdl_jax.conversion.kernels import Kernel
from bcdl_jax.graph.data_flow import analyze_zeros
from bcdl_jax.graph.facts import Flags, in_full
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.program import Program
from bcdl_jax.priors.posterior import Posterior

# The kept weights of a layer, which broadcast against its kernel, and its kept outputs.
_Kept = tuple[Flags, Flags]


@dataclasses.dataclass(frozen=True)
class UselessUnits:
    """The search for useless inputs and outputs in one network.

    Attributes:
      program: The network.
      moving: The parts of the program that depend on the batch size.
      kernels: The kernels by the number of their array.
      num_params: The number of arrays of the params.
    """

    program: Program
    moving: Moving
    kernels: Mapping[int, Kernel]
    num_params: int

    def masked(self, nodes: Mapping[int, Sequence[Any]]) -> dict[int, list[Any]]:
        """The nodes with masks of their useless inputs and outputs.

        Args:
          nodes: The nodes of all layers of each kernel by its number. The values of their weights do not matter, only their masks.

        Returns:
          The nodes in the same form. Only posteriors get masks, quantised layers stay unchanged.
        """
        useful = self._useful_units(jax.device_get(_kept(nodes)))
        return _with_masks(nodes, useful)

    def _useful_units(self, kept: Mapping[int, Sequence[_Kept]]) -> dict[int, list[tuple[Flags, Flags]]]:
        """The useful inputs [in] and outputs [out] of each layer."""
        flags = [np.ones((1,) * len(shape), bool) for shape in self._shapes]
        for place, kernel in self.kernels.items():
            flags[place] = _of_array(kernel, [weights for weights, _ in kept[place]], self._shapes[place])
            if kernel.affine is not None:
                for each in kernel.affine.shifts:
                    flags[each] = np.zeros((1,) * len(self._shapes[each]), bool)
                if kernel.affine.bias is not None:
                    outputs = np.stack([outputs for _, outputs in kept[place]])
                    flags[kernel.affine.bias] = outputs.reshape(self._shapes[kernel.affine.bias])
        facts = analyze_zeros(self.program, flags, self.moving).facts
        live = [in_full(facts[number].live, shape) for number, shape in zip(self.program.inputs, self._shapes)]
        useful = {}
        for place, kernel in self.kernels.items():
            weights = _of_layers(kernel, live[place])
            bias = None if kernel.affine is None or kernel.affine.bias is None else live[kernel.affine.bias]
            inputs = _inputs_of(weights, kernel.layout.canonical.feature_groups)
            outputs = np.asarray(weights.any(tuple(range(1, weights.ndim - 1))))
            if bias is not None:
                outputs = outputs | bias.reshape(outputs.shape)
            useful[place] = list(zip(inputs, outputs, strict=True))
        return useful

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the arrays of the params."""
        return [self.program.shapes[number].shape for number in self.program.inputs[: self.num_params]]


def _of_array(kernel: Kernel, layers: Sequence[Flags], shape: tuple[int, ...]) -> Flags:
    """Flags of the elements of the array of a kernel, from flags of the weights of its layers."""
    flags = np.empty((len(layers), kernel.layout.places.size), bool)
    flags[:, kernel.layout.places.ravel()] = [
        np.broadcast_to(weights, kernel.layout.places.shape).ravel() for weights in layers
    ]
    return flags.reshape(shape)


def _of_layers(kernel: Kernel, array: Flags) -> Flags:
    """Flags of the weights of all layers of a kernel, [layers, *kernel], from flags of the elements of its array."""
    return array.reshape(kernel.layers or 1, -1)[:, kernel.layout.places]


def _inputs_of(weights: Flags, feature_groups: int) -> Flags:
    """Flags of the inputs with a flagged weight, [layers, in], from flags [layers, *window, in / feature groups, out]."""
    connections = weights.any(tuple(range(1, weights.ndim - 2)))
    layers, inputs, _ = connections.shape
    by_group = connections.reshape(layers, inputs, feature_groups, -1).any(-1)
    return np.swapaxes(by_group, 1, 2).reshape(layers, -1)


@jax.jit
def _kept(nodes: Mapping[int, Sequence[Any]]) -> dict[int, list[tuple[jax.Array, jax.Array]]]:
    """The kept weights and outputs of each layer."""
    return {place: [(node.kernel_mask, is_kept(node.output_mask)) for node in each] for place, each in nodes.items()}


@jax.jit
def _with_masks(
    nodes: Mapping[int, Sequence[Any]], useful: Mapping[int, Sequence[tuple[Flags, Flags]]]
) -> dict[int, list[Any]]:
    """The nodes, of which posteriors keep only their useful inputs and outputs."""

    def masked(node: Any, inputs: Any, outputs: Any) -> Any:
        if not isinstance(node, Posterior):
            return node
        return node.with_masks(is_kept(node.input_mask) & inputs, is_kept(node.output_mask) & outputs)

    return {
        place: [masked(node, *each) for node, each in zip(nodes[place], useful[place], strict=True)] for place in nodes
    }
