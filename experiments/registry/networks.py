"""The networks of the experiments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.registry.registry import Registry

if TYPE_CHECKING:  # Importing JAX takes seconds, and --help should appear at once.
    import flax.linen as nn

    import bcdl_jax


@dataclasses.dataclass(frozen=True)
class Network:
    """A network.

    Attributes:
      name: The name in commands and results.
      title: The name in tables.
      build: The module for a family (None for plain layers) and a width, a factor of the paper's.
      chain: Layer names in the order of the data flow.
      image_shape: The shape of the images that the network takes; smaller images are padded.
      has_widths: True if ``build`` makes other widths than 1.
    """

    name: str
    title: str
    build: Callable[[bcdl_jax.Family | None, float], nn.Module]
    chain: tuple[str, ...]
    image_shape: tuple[int, int, int]
    has_widths: bool = False


def _lenet300(family: bcdl_jax.Family | None, width: float) -> nn.Module:
    from experiments.networks.lenet import LeNet300

    return LeNet300(family)


def _lenet5(family: bcdl_jax.Family | None, width: float) -> nn.Module:
    from experiments.networks.lenet import LeNet5

    return LeNet5(family)


def _vgg(family: bcdl_jax.Family | None, width: float) -> nn.Module:
    from experiments.networks.vgg import vgg

    return vgg(family, width)


NETWORKS = Registry(
    "network",
    Network("lenet300", "LeNet-300-100", _lenet300, ("Dense_0", "Dense_1", "Dense_2"), (28, 28, 1)),
    Network("lenet5", "LeNet-5-Caffe", _lenet5, ("Conv_0", "Conv_1", "Dense_0", "Dense_1"), (28, 28, 1)),
    Network(
        "vgg",
        "VGG",
        _vgg,
        (*(f"Conv_{number}" for number in range(13)), "Dense_0", "Dense_1"),
        (32, 32, 3),
        has_widths=True,
    ),
)


def title_at_width(name: str, width: float | None) -> str:
    """A network's name, with its width unless it is the paper's."""
    return name if width in (None, 1) else f"{name} at {width:g} times the width"
