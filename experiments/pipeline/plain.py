"""Compression of plain networks weight by weight: one trained network per seed is pruned, retrained and quantised."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from experiments.pipeline.context import STAGES, RunContext, RunNetworks, compressed_file
from experiments.pipeline.measures import Batch, error_percent, on_device
from experiments.pipeline.plain_work import Found, PlainWork
from experiments.pipeline.pretrain import cross_entropy
from experiments.pipeline.progress import Progress

Method = Callable[[PlainWork, Any, jax.Array], Found]


def compress_plain(context: RunContext, method: Method, pretrained: Sequence[dict[str, np.ndarray]]) -> RunNetworks:
    """Prunes, retrains and quantises one trained network per seed, one after the other.

    Args:
      context: The context of the run, with a ``PlainRecipe``. The family of its model is ``SparseVariationalDropout``, the form in which
        pruned networks are scored.
      method: The method, see ``experiments.pipeline.plain_methods``.
      pretrained: The trained weights, per seed, by "layer/kernel" and "layer/bias".

    Returns:
      The networks of the run.
    """
    start = time.perf_counter()
    recipe, seeds = context.recipe, context.seeds
    validation = on_device(context.dataset.validation)
    work = PlainWork(context.plain_model, on_device(context.dataset.train), recipe, context.chain, _ignore)
    fresh = context.model.init(jax.random.key(0), validation[0][:1])["params"]
    measure = jax.jit(functools.partial(error_percent, context.plain_model))
    nets: dict[str, list[Any]] = {stage: [] for stage in STAGES}
    for seed, named in zip(seeds, pretrained, strict=True):
        with Progress(recipe.epochs + recipe.fine_tune_epochs, f"seed {seed}") as progress:
            reports = _Reports(context, measure, validation, seed, progress)
            stages = _compress_seed(dataclasses.replace(work, report=reports.add), method, fresh, named, seed)
        for stage in STAGES:
            nets[stage].append(stages[stage])
    context.logs.flush()
    for stage in STAGES:
        context.write_params(stage, nets[stage])
    paths = [context.out / compressed_file(seed) for seed in seeds]
    for path, net in zip(paths, nets["reduced"], strict=True):
        bcdl_jax.save(path, net)
    return RunNetworks(
        pretrained=[flax.traverse_util.unflatten_dict(net, "/") for net in pretrained],
        params=nets,
        thresholds=None,
        relative_steps=None,
        by_round_off=None,
        failures=[None] * len(seeds),
        files=paths,
        snapshots=[],
        seconds=time.perf_counter() - start,
        resumed=0,
    )


def _ignore(*_: Any) -> None:
    """No report."""


@dataclasses.dataclass(frozen=True)
class _Reports:
    """The reports of one seed.

    Attributes:
      context: The context of the run.
      measure: A function (params, data) that returns the error of the plain network in percent.
      validation: The validation data, on the device.
      seed: The seed.
      progress: The progress bar of the seed.
    """

    context: RunContext
    measure: Callable[[Any, Batch], jax.Array]
    validation: Batch
    seed: int
    progress: Progress

    def add(self, phase: str, epoch: int, weights: Any, kept: int, loss: float, speed: float) -> None:
        """Logs an epoch and shows it, see ``PlainWork.report``."""
        error = float(self.measure(weights, self.validation))
        metrics = {"epoch": epoch, "seed": self.seed, "loss": loss, "validation_error": error, "kept_weights": kept}
        self.context.logs.log_epoch(phase, [metrics], images_per_second=speed)
        self.progress.advance(f"kept {kept} weights, validation error {error:.2f} %")


def _compress_seed(
    work: PlainWork, method: Method, fresh: Any, named: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """The network of one seed, in variational form, at each of ``STAGES``."""
    params = flax.traverse_util.unflatten_dict({name: jnp.asarray(array) for name, array in named.items()}, "/")
    trained = bcdl_jax.from_trained(fresh, params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 4))
    params, masks, levels = method(work, params, keys[0])
    pruned = bcdl_jax.compression.prune_units(
        bcdl_jax.from_trained(fresh, params), bcdl_jax.baselines.kernels_by_layer(masks), work.chain
    )
    if levels is None:
        levels = bcdl_jax.baselines.share_weights(pruned, work.by_layer(work.recipe.levels))
    return {"trained": trained, "pruned": pruned, "reduced": _tune_levels(work, pruned, levels, keys[1])}


def _tune_levels(work: PlainWork, pruned: Any, shared: tuple[Any, Any], key: jax.Array) -> Any:
    """Trains the levels and the biases [H16 section 3.3].

    Args:
      work: The work.
      pruned: The pruned network, in variational form.
      shared: The assignments and the levels of the weights, each by layer name.
      key: A PRNG key.

    Returns:
      The network with layers of levels.
    """
    layers = bcdl_jax.variational_layers(pruned)
    assignments = {
        name: jnp.where(layers[name].kernel_mask, jnp.asarray(indices), -1) for name, indices in shared[0].items()
    }
    levels = {name: jnp.asarray(values) for name, values in shared[1].items()}
    biases = {name: moments[0] for name, layer in layers.items() if (moments := layer.bias_moments()) is not None}

    def loss(params: Any, assignments: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        return cross_entropy(work.model, _plain_params(params, assignments), images, labels, key)

    def net(params: Any, assignments: Any) -> tuple[Any, Any]:
        kept = jnp.stack([jnp.sum(indices >= 0) for indices in assignments.values()]).sum()
        return _plain_params(params, assignments), kept

    recipe, epochs = work.recipe, work.recipe.fine_tune_epochs
    if epochs:
        schedule = optax.cosine_decay_schedule(recipe.fine_tune_learning_rate, max(1, epochs * work.steps))
        (levels, biases), _ = work.fit(
            loss,
            optax.adam(schedule),
            (levels, biases),
            assignments,
            key,
            epochs,
            net=net,
            phase="fine_tune",
            done=recipe.epochs,
        )
    return bcdl_jax.baselines.reduce_to_levels(_with_biases(pruned, biases), assignments, levels)


def _with_biases(net: Any, biases: dict[str, jax.Array]) -> Any:
    """The network with other means of its biases, by layer name."""
    layers = bcdl_jax.variational_layers(net)
    tuned = iter([layer.replace(bias_mean=biases.get(name)) for name, layer in layers.items()])
    # ``variational_layers`` has the order of the tree.
    return jax.tree.map(
        lambda node: next(tuned) if isinstance(node, bcdl_jax.Posterior) else node,
        net,
        is_leaf=bcdl_jax.compression.is_layer,
    )


def _plain_params(levels_and_biases: tuple[Any, Any], assignments: Any) -> Any:
    """The params of the plain network whose weights are the assigned levels."""
    levels, biases = levels_and_biases
    kernels = bcdl_jax.baselines.kernels_from_levels(assignments, levels)
    flat = {f"{name}/kernel": kernel for name, kernel in kernels.items()}
    flat |= {f"{name}/bias": bias for name, bias in biases.items()}
    return flax.traverse_util.unflatten_dict(flat, "/")
