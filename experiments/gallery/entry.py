"""The description of a gallery network: its data, the network, its loss and the recipe of its plain training."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.runtime.errors import UserError

PARTS = ("train", "validation", "test")
Apply = Callable[[Any, Any], Any]


class Examples(NamedTuple):
    """Examples with their targets.

    Attributes:
      inputs: The inputs of the network, [n, ...].
      targets: The targets of the loss, [n, ...].
      mask: The targets that count, 1 or 0, of the shape of ``targets``; None where all count.
    """

    inputs: Any
    targets: Any
    mask: Any = None

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.inputs)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Data in three parts that share no example.

    Attributes:
      train: The training examples.
      validation: The validation examples, held out of training.
      test: The test examples, which are read once, at the end.
      remark: One sentence if the data differ from the original ones, else None.
    """

    train: Examples
    validation: Examples
    test: Examples
    remark: str | None = None

    def sizes(self) -> dict[str, int]:
        """The number of examples of each part."""
        return {part: getattr(self, part).size for part in PARTS}


@dataclasses.dataclass(frozen=True)
class PlainRecipe:
    """The recipe of a plain training. The learning rate rises in the first epoch, then falls to zero as a cosine.

    Attributes:
      epochs: The number of epochs.
      learning_rate: The largest learning rate.
      batch_size: The number of examples per step. An epoch leaves out its last incomplete batch.
      optimizer: The optimiser: "adam", or "sgd" with a Nesterov momentum of 0.9.
      weight_decay: The weight decay of all arrays but vectors: decoupled with "adam", a part of the gradient with "sgd".
      clip: The largest norm of the gradient; None for no limit.
      mirror: True to mirror training images at random.
      shift: The largest random shift of training images along each axis, in pixels.
      seed: The seed of the start and of the order of the examples.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 128
    optimizer: str = "adam"
    weight_decay: float = 0.0
    clip: float | None = None
    mirror: bool = False
    shift: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class GalleryNetwork:
    """A network of the gallery.

    Attributes:
      name: The name for the command and for files.
      title: The network in words.
      data: The data in words.
      load: A function of the directory of tensorflow-datasets, or None, that returns the data.
      make: A function of a key that returns ``apply(variables, inputs)`` and new variables.
      loss: The name of the loss in ``LOSSES``.
      recipe: The recipe of the plain training.
      learn: A function (variables, inputs) that returns the outputs in training and the new values of the variables beside "params"; None for a
        network whose variables are all trained and which computes the same in training.
      unit: The unit of the targets of a regression.
      packages: The packages that the network and its data need beyond the project's own, by the name under which they are imported.
    """

    name: str
    title: str
    data: str
    load: Callable[[str | None], Splits]
    make: Callable[[Any], tuple[Apply, Any]]
    loss: str
    recipe: PlainRecipe
    learn: Callable[[Any, Any], tuple[Any, Any]] | None = None
    unit: str = ""
    packages: tuple[str, ...] = ()

    def check_packages(self) -> None:
        """Raises UserError if a package of the network is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{self.name} needs the package {package}: pip install 'bcdl-jax[gallery]'.")
