"""The sides of the training benchmark: functions that train the same network for one epoch, in this project and in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from experiments.io import data
from experiments.networks.lenet import LeNet5, LeNet300
from experiments.networks.vgg import VGG, VGG_WIDTHS, vgg_widths
from experiments.pipeline.measures import mean_cross_entropy, sampled_cross_entropy
from experiments.registry import NETWORKS, title_at_width

_LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class TrainingCase:
    """A network of the training benchmark, the options of its twin in PyTorch, and the sizes of the measurements.

    Attributes:
      make_model: A function (dtype, width) that returns the variational Flax module.
      cross_entropy: A function (model, params, batch, key) that returns the mean cross-entropy of the batch in nats, for sampled weights.
      torch_options: The options of ``torch_twins.network``.
      seeds: The number of seeds that are trained in one program.
      cpu_examples: The number of images per epoch on a CPU, where an epoch should take about a second.
    """

    make_model: Callable[[Any, float], nn.Module]
    cross_entropy: Callable[..., jax.Array]
    torch_options: dict[str, Any]
    seeds: int
    cpu_examples: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one comparison.

    Attributes:
      network: The name of the network, one of ``CASES``.
      images: The images, [examples, height, width, channels] of uint8.
      labels: The classes of the images, [examples].
      batch_size: The number of images per step.
      dtype: The dtype of the computation: "float32" or "bfloat16".
      width: The factor of VGG's widths.
    """

    network: str
    images: np.ndarray
    labels: np.ndarray
    batch_size: int
    dtype: str
    width: float

    @property
    def steps(self) -> int:
        """The number of steps per epoch."""
        return len(self.labels) // self.batch_size

    @property
    def case(self) -> TrainingCase:
        """The network and its twin."""
        return CASES[self.network]

    @functools.cached_property
    def model(self) -> nn.Module:
        """The variational Flax module."""
        return self.case.make_model(None if self.dtype == "float32" else self.dtype, self.width)

    @property
    def title(self) -> str:
        """The name of the network for printed lines, with its width unless it is the paper's."""
        network = NETWORKS[self.network]
        return title_at_width(network.title, self.width if network.has_widths else None)

    def description(self) -> dict[str, Any]:
        """The settings as entries of the result file."""
        return {
            "network": self.network,
            "title": self.title,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "examples": len(self.labels),
        }


def images_of(network: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels for a network: the embedded digits in the shape that it takes, repeated as needed.

    Args:
      network: The name of the network.
      examples: The number of images.
    """
    digits = data.load(data.EMBEDDED).padded_to(NETWORKS[network].image_shape).train
    order = np.random.default_rng(0).permutation(len(digits))  # The file is sorted by class.
    rows = order[np.arange(examples) % len(digits)]
    return digits.images[rows], digits.labels[rows]


def fresh_state(settings: Settings, seed: int = 0) -> bcdl_jax.train.TrainState:
    """The state of this project before the first step."""
    optimizer = optax.adam(_LEARNING_RATE)
    return bcdl_jax.train.create_train_state(_fresh_params(settings, seed), optimizer, jax.random.key(seed))


def jax_epoch(settings: Settings, state: Any) -> Callable[[Any], tuple[Any, jax.Array]]:
    """Compiles an epoch of this project.

    Args:
      settings: The settings of the training.
      state: An example of a state, or of stacked states, which are trained in one program.

    Returns:
      A function ``epoch(state) -> (state, mean loss)``, which donates its argument.
    """
    likelihood = functools.partial(settings.case.cross_entropy, settings.model)
    optimizer = optax.adam(_LEARNING_RATE)
    step = bcdl_jax.train.make_train_step(likelihood, optimizer, num_examples=len(settings.labels))
    train = (jnp.asarray(settings.images), jnp.asarray(settings.labels))
    epoch: Any = bcdl_jax.train.make_train_epoch(step, batch_size=settings.batch_size)
    if state.step.ndim:
        epoch = bcdl_jax.train.each_seed(epoch)
    compiled = jax.jit(epoch, donate_argnums=0).lower(state, train).compile()

    def run(state: Any) -> tuple[Any, jax.Array]:
        state, metrics = compiled(state, train)
        return state, jnp.mean(metrics["loss"])

    return run


def our_side(settings: Settings) -> tuple[Callable[[], float], float]:
    """Compiles the side of this project.

    Returns:
      A function that trains one epoch and returns its mean loss, and the compile time in seconds.
    """
    state = fresh_state(settings)
    start = time.perf_counter()
    epoch = jax_epoch(settings, state)
    seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, loss = jax.block_until_ready(epoch(state))
        return float(loss)

    return run, seconds


def torch_side(settings: Settings, device: str, compiled: bool) -> Callable[[], float]:
    """Builds the side of PyTorch.

    Args:
      settings: The settings of the training.
      device: The kind of device, "cpu" or "gpu".
      compiled: True for ``torch.compile``, False for eager PyTorch.

    Returns:
      A function that trains one epoch and returns its mean loss.

    Raises:
      ImportError: PyTorch is not installed.
    """
    from experiments.benchmarks import torch_twins

    layers: Mapping[str, Any] = bcdl_jax.variational_layers(jax.device_get(_fresh_params(settings)))
    posteriors = [layers[name] for name in NETWORKS[settings.network].chain]
    return torch_twins.epoch(
        torch_twins.network(posteriors, **settings.case.torch_options),
        settings.images,
        settings.labels,
        batch_size=settings.batch_size,
        learning_rate=_LEARNING_RATE,
        device="cuda" if device == "gpu" else "cpu",
        dtype=settings.dtype,
        compiled=compiled,
    )


def _fresh_params(settings: Settings, seed: int = 0) -> Any:
    """The start values, the same for all sides."""
    return jax.jit(settings.model.init)(jax.random.key(seed), settings.images[:1])["params"]


def _batch_norm_cross_entropy(
    model: nn.Module, params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array
) -> jax.Array:
    """``sampled_cross_entropy`` for a network with batch norms. Their moving averages are dropped, since training does not read them."""
    images, labels = batch
    logits: Any
    logits, _ = model.apply(
        {"params": params}, images, deterministic=False, train=True, rngs={"noise": key}, mutable=["batch_stats"]
    )
    return mean_cross_entropy(logits, labels)


CASES = {
    "lenet300": TrainingCase(
        lambda dtype, width: LeNet300(dtype=dtype), sampled_cross_entropy, {}, seeds=8, cpu_examples=12_800
    ),
    "lenet5": TrainingCase(
        lambda dtype, width: LeNet5(dtype=dtype),
        sampled_cross_entropy,
        {"pool_after": (0, 1)},
        seeds=3,
        cpu_examples=5_120,
    ),
    # With batch norms, unlike the network of the experiment.
    "vgg": TrainingCase(
        lambda dtype, width: VGG(**vgg_widths(width), dtype=dtype),
        _batch_norm_cross_entropy,
        {
            "padding": 1,
            "pool_after": tuple((np.cumsum([len(part) for part in VGG_WIDTHS]) - 1).tolist()),
            "batch_norm": True,
        },
        seeds=2,
        cpu_examples=256,
    ),
}
