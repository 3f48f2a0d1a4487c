"""The methods that compress a plain network weight by weight: Deep Compression, Dynamic Network Surgery and soft weight-sharing."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from experiments.io.data import Dataset
from experiments.io.logs import Logs
from experiments.pipeline import bayesian as compress
from experiments.pipeline.pretrain import cross_entropy, make_fit
from experiments.pipeline.recipe import PlainRecipe

# What a method gives: the params of the plain network, masks of the same structure, and the levels that its weights share, if it has
# found them too.
_Found = tuple[Any, Any, tuple[dict[str, Any], dict[str, Any]] | None]


def compress_plain(
    method: str,
    model: nn.Module,
    dataset: Dataset,
    recipe: PlainRecipe,
    *,
    chain: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    logs: Logs,
    pretrained: Sequence[dict[str, np.ndarray]],
) -> compress.Run:
    """Prunes, retrains and quantises one trained net per seed, one after the other.

    Args:
      method: "dc", "dns" or "sws".
      model: with a field ``family`` that None makes plain, and with ``bcdl_jax.SparseVariationalDropout`` as its family: the form in which
        pruned networks are scored.
      dataset: only its training and validation parts are used.
      recipe: see ``PlainRecipe``.
      chain: layer names in the order of the data flow.
      seeds: one run each.
      out: directory for the parameters.
      logs: where the metrics go.
      pretrained: per seed, the weights by "layer/kernel" and "layer/bias".
    """
    start = time.perf_counter()
    train, validation = compress.on_device(dataset.train), compress.on_device(dataset.validation)
    twin: Any = model.clone(family=None)  # type: ignore[call-arg]
    fresh = model.init(jax.random.key(0), validation[0][:1])["params"]
    measure = jax.jit(functools.partial(compress.error_percent, twin))
    methods = {"dc": _deep_compression, "dns": _network_surgery, "sws": _soft_weight_sharing}
    nets: dict[str, list[Any]] = {stage: [] for stage in compress.STAGES}
    for seed, given in zip(seeds, pretrained, strict=True):
        params = flax.traverse_util.unflatten_dict({name: jnp.asarray(array) for name, array in given.items()}, "/")
        nets["trained"].append(bcdl_jax.from_trained(fresh, params))
        epochs = recipe.epochs + recipe.fine_tune_epochs
        with compress.Progress(epochs, f"seed {seed}") as progress:

            def show(
                phase: str,
                epoch: int,
                weights: Any,
                kept: int,
                loss: float,
                speed: float,
                seed: int = seed,
                progress: Any = progress,
            ) -> None:
                error = float(measure(weights, validation))
                metrics = {"epoch": epoch, "seed": seed, "loss": loss, "validation_error": error, "kept_weights": kept}
                logs.log_epoch(phase, [metrics], images_per_second=speed)
                progress.say(f"kept {kept} weights, validation error {error:.2f} %")

            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 4))
            work = _Work(twin, train, recipe, chain, show)
            params, masks, levels = methods[method](work, params, keys[0])
            pruned = bcdl_jax.compression.prune_units(
                bcdl_jax.from_trained(fresh, params), bcdl_jax.baselines.kernels_by_layer(masks), chain
            )
            nets["pruned"].append(pruned)
            if levels is None:
                levels = bcdl_jax.baselines.share_weights(pruned, dict(zip(chain, recipe.levels, strict=True)))
            nets["reduced"].append(_tune_levels(work, pruned, levels, keys[1]))
    logs.flush()
    for stage in compress.STAGES:
        compress.write_params(out, stage, nets[stage], seeds)
    paths = [out / compress.compressed_file(seed) for seed in seeds]
    for path, net in zip(paths, nets["reduced"], strict=True):
        bcdl_jax.save(path, net)
    return compress.Run(
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


class _Work:
    """What the methods share: the plain network, the data, the recipe, and what is done after each epoch."""

    def __init__(
        self, twin: nn.Module, train: Any, recipe: PlainRecipe, chain: Sequence[str], show: Callable[..., None]
    ):
        self.twin, self.train, self.recipe, self.chain, self.show = twin, train, recipe, chain, show
        self.steps = len(train[1]) // recipe.batch_size

    def with_dropout(self, rate: float) -> Any:
        return self.twin.clone(dropout=rate) if rate else self.twin  # type: ignore[call-arg]

    def fit(
        self,
        loss: Callable[..., jax.Array],
        optimizer: optax.GradientTransformation,
        params: Any,
        fixed: Any,
        key: jax.Array,
        epochs: int,
        *,
        net: Callable[[Any, Any], tuple[Any, Any]],
        phase: str = "train",
        done: int = 0,
        after_step: Callable[..., Any] = lambda params, fixed, step: fixed,
    ) -> tuple[Any, Any]:
        """Trains for some epochs, of which ``net(params, fixed)``, the weights in use and their number, is shown."""
        look = jax.jit(net)

        def report(epoch: int, params: Any, fixed: Any, mean_loss: float, speed: float) -> None:
            weights, kept = look(params, fixed)
            self.show(phase, done + epoch, weights, int(kept), mean_loss, speed)

        with compress.bar(epochs * self.steps, phase, "step") as bar:
            fit = make_fit(
                loss,
                optimizer,
                self.train,
                self.recipe.batch_size,
                after_step,
                mirror=self.recipe.mirror,
                shift=self.recipe.shift,
            )
            return fit(params, fixed, key, epochs, bar, report)

    def round_limits(self, number: int) -> list[tuple[int, int]]:
        """The epochs before and at the end of each round: all but the last one are as long, but for rounding."""
        last = (number + 1) / (2 * number) if self.recipe.last_round is None else self.recipe.last_round
        each = self.recipe.epochs * (1 - last) / max(1, number - 1)
        starts = [math.floor(before * each + 1e-6) for before in range(number)]
        return list(zip(starts, [*starts[1:], self.recipe.epochs], strict=True))

    def cosine(self, epochs: int) -> optax.GradientTransformation:
        """AdamW with the recipe's learning rate, which falls to 0 over so many epochs."""
        schedule = optax.cosine_decay_schedule(self.recipe.learning_rate, max(1, epochs * self.steps))
        return optax.adamw(schedule, weight_decay=self.recipe.weight_decay)

    def by_layer(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.chain, values, strict=True))


def _kept(masks: Any) -> jax.Array:
    return jnp.stack([jnp.sum(mask) for mask in bcdl_jax.baselines.kernels_by_layer(masks).values()]).sum()


def _deep_compression(work: _Work, params: Any, key: jax.Array) -> _Found:
    """Prunes the smallest weights and trains the others on, round after round [Han et al. 2016, section 2]."""

    def make_loss(kept: float) -> Callable[..., jax.Array]:
        twin = work.with_dropout(work.recipe.dropout * math.sqrt(kept))

        def loss(params: Any, masks: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
            return cross_entropy(twin, bcdl_jax.baselines.apply_masks(params, masks), images, labels, key)

        return loss

    def net(params: Any, masks: Any) -> tuple[Any, Any]:
        return bcdl_jax.baselines.apply_masks(params, masks), _kept(masks)

    total = sum(kernel.size for kernel in bcdl_jax.baselines.kernels_by_layer(params).values())
    rounds, masks = work.recipe.rounds, None
    for number, (begin, end) in enumerate(work.round_limits(rounds), start=1):
        shares = {name: share ** (number / rounds) for name, share in work.by_layer(work.recipe.kept).items()}
        masks = bcdl_jax.baselines.magnitude_masks(params, shares)
        params = bcdl_jax.baselines.apply_masks(params, masks)
        round_key = jax.random.fold_in(key, number)
        loss = make_loss(float(_kept(masks)) / total)
        params, masks = work.fit(
            loss, work.cosine(end - begin), params, masks, round_key, end - begin, net=net, done=begin
        )
    return params, masks, None


def _network_surgery(work: _Work, params: Any, key: jax.Array) -> _Found:
    """Prunes and splices at random steps, ever more rarely, while all weights are trained on [Guo et al. 2016]."""
    thresholds = bcdl_jax.baselines.surgery_thresholds(params, work.by_layer(work.recipe.spread))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    chance_key, order_key = jax.random.split(key)

    def loss(params: Any, masks: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        return cross_entropy(
            work.twin, bcdl_jax.baselines.apply_masks(params, masks, splicing=True), images, labels, key
        )

    def after_step(params: Any, masks: Any, step: jax.Array) -> Any:
        chance = 1 / (1 + work.recipe.surgery_decay * step)
        now = jax.random.bernoulli(jax.random.fold_in(chance_key, step), chance)
        updated = bcdl_jax.baselines.prune_and_splice(params, masks, thresholds)
        return jax.tree.map(functools.partial(jnp.where, now), updated, masks)

    def net(params: Any, masks: Any) -> tuple[Any, Any]:
        return bcdl_jax.baselines.apply_masks(params, masks), _kept(masks)

    epochs = work.recipe.epochs
    params, masks = work.fit(
        loss, work.cosine(epochs), params, masks, order_key, epochs, net=net, after_step=after_step
    )
    return bcdl_jax.baselines.apply_masks(params, masks), masks, None


def _soft_weight_sharing(work: _Work, params: Any, key: jax.Array) -> _Found:
    """Trains the network and a mixture prior of its weights together [Ullrich et al. 2017], round after round.

    After each round the weights of the component at zero are set to zero, and the next one trains the others under a new mixture, of which
    those zeros make the component at zero narrow. The levels are the means of the components after the last round.
    """
    recipe = work.recipe
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    num_examples = len(work.train[1])
    twin = work.with_dropout(recipe.dropout)

    def make_loss(prior_weight: float) -> Callable[..., jax.Array]:
        def loss(both: Any, masks: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
            params = bcdl_jax.baselines.apply_masks(both[0], masks)
            prior = bcdl_jax.baselines.mixture_nll(params, both[1])
            return cross_entropy(twin, params, images, labels, key) + prior_weight * prior / num_examples

        return loss

    def net(both: Any, masks: Any) -> tuple[Any, Any]:
        params, mixture = bcdl_jax.baselines.apply_masks(both[0], masks), both[1]
        # What the end of the round will keep; until then the others are in use, too.
        kept = [
            jnp.sum(jnp.argmax(mixture.log_joint(kernel), 0) > 0)
            for kernel in bcdl_jax.baselines.kernels_by_layer(params).values()
        ]
        return params, jnp.stack(kept).sum()

    number_of_rounds = len(recipe.deviations)
    rounds = zip(recipe.deviations, recipe.prior_weights, work.round_limits(number_of_rounds), strict=True)
    for number, (deviation, prior_weight, (begin, end)) in enumerate(rounds, start=1):
        if begin == end and number < number_of_rounds:
            continue  # so few epochs are too few for so many rounds: a round without any would prune what nothing makes up for
        mixture = bcdl_jax.baselines.create_mixture(params, recipe.components, recipe.zero_proportion, deviation)
        transforms = {
            "net": work.cosine(end - begin),
            "means": optax.adam(recipe.means_learning_rate),
            "others": optax.adam(recipe.mixture_learning_rate),
        }
        kinds: dict[str, Any] = {"means": "means", "log_precisions": "others", "logits": "others"}
        optimizer = optax.partition(transforms, ("net", dataclasses.replace(mixture, **kinds)))
        round_key = jax.random.fold_in(key, number - 1)
        (params, mixture), _ = work.fit(
            make_loss(prior_weight), optimizer, (params, mixture), masks, round_key, end - begin, net=net, done=begin
        )
        places, levels = bcdl_jax.baselines.collapse(bcdl_jax.baselines.apply_masks(params, masks), mixture)
        found = bcdl_jax.baselines.mask_tree(params, {name: place >= 0 for name, place in places.items()})
        masks = jax.tree.map(jnp.logical_and, masks, found)
        params = bcdl_jax.baselines.apply_masks(params, masks)
    return params, masks, (places, levels)


def _tune_levels(work: _Work, pruned: Any, shared: tuple[Any, Any], key: jax.Array) -> Any:
    """Trains the levels and the biases [Han et al. 2016, section 3.3], and makes layers of levels of them."""
    layers = bcdl_jax.variational_layers(pruned)
    places = {name: jnp.where(layers[name].kernel_mask, jnp.asarray(place), -1) for name, place in shared[0].items()}
    levels = {name: jnp.asarray(values) for name, values in shared[1].items()}
    biases = {name: moments[0] for name, layer in layers.items() if (moments := layer.bias_moments()) is not None}

    def weights(params: Any, places: Any) -> Any:
        levels, biases = params
        shared = bcdl_jax.baselines.kernels_from_levels(places, levels)
        flat = {f"{name}/kernel": kernel for name, kernel in shared.items()}
        flat |= {f"{name}/bias": bias for name, bias in biases.items()}
        return flax.traverse_util.unflatten_dict(flat, "/")

    def loss(params: Any, places: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        return cross_entropy(work.twin, weights(params, places), images, labels, key)

    def net(params: Any, places: Any) -> tuple[Any, Any]:
        kept = jnp.stack([jnp.sum(place >= 0) for place in places.values()]).sum()
        return weights(params, places), kept

    epochs = work.recipe.fine_tune_epochs
    if epochs:
        optimizer = optax.adam(
            optax.cosine_decay_schedule(work.recipe.fine_tune_learning_rate, max(1, epochs * work.steps))
        )
        (levels, biases), _ = work.fit(
            loss, optimizer, (levels, biases), places, key, epochs, net=net, phase="fine_tune", done=work.recipe.epochs
        )
    with_biases = {
        name: {"posterior": layer.replace(bias_mean=biases.get(name))}  # type: ignore[attr-defined]
        for name, layer in layers.items()
    }
    return bcdl_jax.baselines.reduce_to_levels(with_biases, places, levels)
