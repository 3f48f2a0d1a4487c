"""The experiments: a network, its data sets, and a recipe for each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.io.dataset_table import EMBEDDED, MNIST_SHAPE, names_of_shape
from experiments.pipeline.recipe import Training
from experiments.registry.methods import is_plain
from experiments.registry.networks import NETWORKS, Network
from experiments.registry.recipes import lenet5, lenet300, vgg
from experiments.registry.registry import Registry

# The methods whose recipes stand in for those of methods that have none.
DEFAULT_METHOD, DEFAULT_PLAIN_METHOD = "gnj", "sws"
Recipes = Mapping[str, Mapping[str, Training]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
      name: The name of the command, of results and of the default output directory.
      network_name: The name of the network in ``NETWORKS``.
      pictures: Names of the pictures that a run draws.
      recipes: Recipes by method and data set. A data set without a recipe uses that of the first data set, and a method without recipes
        those of "gnj", or of "sws" if it is a plain method.
      quick: Changes of the recipe with ``--quick``.
      datasets: Names of the data sets, the paper's first, which is the default.
      full_width: Recipes for the paper's width, where they differ, by method and data set.
    """

    name: str
    network_name: str
    pictures: tuple[str, ...]
    recipes: Recipes
    quick: Mapping[str, Any]
    datasets: tuple[str, ...] = names_of_shape(MNIST_SHAPE)
    full_width: Recipes = dataclasses.field(default_factory=dict)

    @property
    def network(self) -> Network:
        return NETWORKS[self.network_name]

    def recipe(self, dataset: str, quick: bool = False, method: str = DEFAULT_METHOD, width: float = 1) -> Training:
        """The recipe for a data set and a method."""
        default = DEFAULT_PLAIN_METHOD if is_plain(method) else DEFAULT_METHOD
        by_dataset = self.recipes[method if method in self.recipes else default]
        chosen = by_dataset.get(dataset, by_dataset[self.datasets[0]])
        if width == 1:
            chosen = self.full_width.get(method, {}).get(dataset, chosen)
        if not quick:
            return chosen
        names = {field.name for field in dataclasses.fields(chosen)}
        changes = {name: value for name, value in self.quick.items() if name in names}
        # A plain network is compressed only once it has been trained.
        if not chosen.variational:
            changes["pretrain_epochs"] = 1
        return dataclasses.replace(chosen, **changes)


EXPERIMENTS = Registry(
    "experiment",
    Experiment("lenet300", "lenet300", lenet300.PICTURES, lenet300.RECIPES, lenet300.QUICK),
    Experiment("lenet5", "lenet5", lenet5.PICTURES, lenet5.RECIPES, lenet5.QUICK),
    Experiment(
        "vgg", "vgg", vgg.PICTURES, vgg.RECIPES, vgg.QUICK, datasets=("cifar10", EMBEDDED), full_width=vgg.FULL_WIDTH
    ),
)


def paper_datasets() -> tuple[str, ...]:
    """The names of the data sets of the paper's experiments, each once."""
    return tuple(dict.fromkeys(experiment.datasets[0] for experiment in EXPERIMENTS.values()))
