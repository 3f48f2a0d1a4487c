"""Bayesian compression of an experiment: train many seeds, prune, fine-tune, reduce precision, write the files."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from tqdm import tqdm

import bcdl_jax
from experiments.pipeline.context import RunContext, RunNetworks, compressed_file
from experiments.pipeline.measures import Batch, measure_change, on_device, score_of
from experiments.pipeline.phase import Phase
from experiments.pipeline.phases import run_phase
from experiments.runtime import memory
from experiments.runtime.errors import UserError


def compress(context: RunContext, pretrained: Sequence[dict[str, np.ndarray]] | None) -> RunNetworks:
    """Trains, prunes, fine-tunes and reduces the precision of one network per seed.

    Completed parts are restored from the checkpoints of the context, and the rest follows from them.

    Args:
      context: The context of the run, with a ``Recipe``.
      pretrained: The weights to start from, per seed, by "layer/kernel" and "layer/bias"; None to start from scratch.

    Raises:
      UserError: The pretrained weights do not fit the model, or values that are not finite stopped every seed.
    """
    start = time.perf_counter()
    recipe, seeds, chain, checkpoints = context.recipe, context.seeds, context.chain, context.checkpoints
    validation = on_device(context.dataset.validation)
    train, held_out = _placed(context, validation)
    fresh = functools.partial(_fresh_params, context.model, validation[0][:1], recipe.balanced)
    weights = None if pretrained is None else bcdl_jax.train.stack_seeds(pretrained)
    result = run_phase(Phase(context, "train", train, held_out), fresh, weights)
    failures, snapshots = result.failures, result.snapshots
    trained = _unstacked(result.params, seeds)
    context.write_params("trained", trained)
    if all(failures):
        checkpoints.remove()  # a resumed run would fail in the same way
        raise UserError(f"No seed could be trained to the end; their last states are in {context.out}. {failures[0]}")
    thresholds = _choose_thresholds(context, trained, validation)
    pruned = [
        bcdl_jax.prune(net, by_layer, chain, score_of(recipe))
        for net, by_layer in zip(trained, thresholds, strict=True)
    ]
    if recipe.fine_tune_epochs:
        stacked = bcdl_jax.train.stack_seeds(pruned)
        result = run_phase(Phase(context, "fine_tune", train, held_out), _given_params, stacked)
        failures = [first or later for first, later in zip(failures, result.failures, strict=True)]
        pruned = _unstacked(result.params, seeds)
    context.write_params("pruned", pruned)
    change_from = measure_change(context.model, validation[0])
    steps = [
        bcdl_jax.choose_relative_step(net, change_from(net), max_increase=recipe.max_rounding_change) for net in pruned
    ]
    reduced = [bcdl_jax.reduce_precision(net, step) for net, step in zip(pruned, steps, strict=True)]
    context.write_params("reduced", reduced)
    compressed = [context.out / compressed_file(seed) for seed in seeds]
    for path, net in zip(compressed, reduced, strict=True):
        bcdl_jax.save(path, net)
    return RunNetworks(
        pretrained=None if pretrained is None else [flax.traverse_util.unflatten_dict(net, "/") for net in pretrained],
        params={"trained": trained, "pruned": pruned, "reduced": reduced},
        thresholds=thresholds,
        relative_steps=steps,
        by_round_off=[bcdl_jax.compression.reduce_precision_by_round_off(net) for net in pruned],
        failures=failures,
        files=compressed,
        snapshots=snapshots,
        seconds=checkpoints.earlier_seconds + time.perf_counter() - start,
        resumed=checkpoints.resumed,
    )


def _choose_thresholds(context: RunContext, trained: Sequence[Any], validation: Batch) -> list[dict[str, float]]:
    """The given thresholds, or the chosen ones of each seed."""
    if context.thresholds:
        return [context.thresholds] * len(trained)
    recipe = context.recipe
    shrinks = recipe.max_shrinking_change is not None
    return [
        bcdl_jax.choose_thresholds(
            net,
            measure_change(context.model, validation[0], net if shrinks else None)(net),
            max_increase=recipe.max_pruning_change,
            chain=context.chain,
            score=score_of(recipe),
        )
        for net in tqdm(trained, desc="choose thresholds", unit="seed", disable=not sys.stderr.isatty())
    ]


def _fresh_params(
    model: nn.Module, images: jax.Array, balanced: bool, seed: jax.Array, weights: dict[str, jax.Array] | None
) -> Any:
    """The start values of one seed, from trained weights if there are any."""
    params = model.init(jax.random.key(seed), images)["params"]
    if weights is not None:
        params = bcdl_jax.from_trained(params, weights)
    return bcdl_jax.balance_scales(params) if balanced else params


def _given_params(_: jax.Array, params: Any) -> Any:
    return params


def _unstacked(params: Any, seeds: Sequence[int]) -> list[Any]:
    jax.clear_caches()  # the compiled phases take most of the memory
    memory.release_memory()
    return [bcdl_jax.train.select_seed(params, index) for index in range(len(seeds))]


def _placed(context: RunContext, validation: Batch) -> tuple[Any, Any]:
    """The training data and the validation data on the devices: the former in parts, the latter whole on every device."""
    dataset, mesh = context.dataset, context.mesh
    if mesh is None:
        return on_device(dataset.train), validation
    rows = bcdl_jax.train.process_rows(mesh, len(dataset.train))
    part = dataset.train.images[rows], dataset.train.labels[rows]
    return (
        bcdl_jax.train.place_data(part, mesh, examples=len(dataset.train)),
        bcdl_jax.train.place_state(validation, mesh),
    )
