"""Deep Compression, Dynamic Network Surgery and soft weight-sharing.

A method is a function of a ``PlainWork``, the params of a trained plain network and a PRNG key. It returns the pruned params, their masks,
and the assignments and levels of the weights; None in place of the last two if it finds no levels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bcdl_jax
from experiments.pipeline.plain_work import Found, PlainWork, kept_count
from experiments.pipeline.pretrain import cross_entropy


def deep_compression(work: PlainWork, params: Any, key: jax.Array) -> Found:
    """Deep Compression: prunes the smallest weights and retrains the others, in several rounds [H16 section 2]."""

    def make_loss(kept: float) -> Callable[..., jax.Array]:
        twin = work.with_dropout(work.recipe.dropout * math.sqrt(kept))

        def loss(params: Any, masks: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
            return cross_entropy(twin, bcdl_jax.baselines.apply_masks(params, masks), images, labels, key)

        return loss

    def net(params: Any, masks: Any) -> tuple[Any, Any]:
        return bcdl_jax.baselines.apply_masks(params, masks), kept_count(masks)

    total = sum(kernel.size for kernel in bcdl_jax.baselines.kernels_by_layer(params).values())
    rounds, masks = work.recipe.rounds, None
    for number, (begin, end) in enumerate(work.round_limits(rounds), start=1):
        shares = {name: share ** (number / rounds) for name, share in work.by_layer(work.recipe.kept).items()}
        masks = bcdl_jax.baselines.magnitude_masks(params, shares)
        params = bcdl_jax.baselines.apply_masks(params, masks)
        round_key = jax.random.fold_in(key, number)
        loss = make_loss(float(kept_count(masks)) / total)
        params, masks = work.fit(
            loss, work.cosine(end - begin), params, masks, round_key, end - begin, net=net, done=begin
        )
    return params, masks, None


def network_surgery(work: PlainWork, params: Any, key: jax.Array) -> Found:
    """Dynamic Network Surgery: prunes and splices at random steps, with falling probability, while all weights are trained [G16]."""
    thresholds = bcdl_jax.baselines.surgery_thresholds(params, work.by_layer(work.recipe.spread))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    update_key, order_key = jax.random.split(key)

    def loss(params: Any, masks: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        return cross_entropy(
            work.model, bcdl_jax.baselines.apply_masks(params, masks, splicing=True), images, labels, key
        )

    def after_step(params: Any, masks: Any, step: jax.Array) -> Any:
        probability = 1 / (1 + work.recipe.surgery_decay * step)
        updates = jax.random.bernoulli(jax.random.fold_in(update_key, step), probability)
        updated = bcdl_jax.baselines.prune_and_splice(params, masks, thresholds)
        return jax.tree.map(functools.partial(jnp.where, updates), updated, masks)

    def net(params: Any, masks: Any) -> tuple[Any, Any]:
        return bcdl_jax.baselines.apply_masks(params, masks), kept_count(masks)

    epochs = work.recipe.epochs
    params, masks = work.fit(
        loss, work.cosine(epochs), params, masks, order_key, epochs, net=net, after_step=after_step
    )
    return bcdl_jax.baselines.apply_masks(params, masks), masks, None


def soft_weight_sharing(work: PlainWork, params: Any, key: jax.Array) -> Found:
    """Soft weight-sharing: trains the network and a mixture prior of its weights together, in several rounds [U17].

    After each round, the weights of the component at zero are set to zero. The next round trains the other weights under a new mixture,
    whose component at zero is narrow because of those zeros. The levels are the means of the components after the last round.
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
        # These weights would stay if the round ended now. During the round all weights are in use.
        kept = [
            jnp.sum(jnp.argmax(mixture.log_joint(kernel), 0) > 0)
            for kernel in bcdl_jax.baselines.kernels_by_layer(params).values()
        ]
        return params, jnp.stack(kept).sum()

    number_of_rounds = len(recipe.deviations)
    rounds = zip(recipe.deviations, recipe.prior_weights, work.round_limits(number_of_rounds), strict=True)
    for number, (deviation, prior_weight, (begin, end)) in enumerate(rounds, start=1):
        if begin == end and number < number_of_rounds:
            continue  # A round without epochs would prune without retraining.
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
        assignments, levels = bcdl_jax.baselines.collapse(bcdl_jax.baselines.apply_masks(params, masks), mixture)
        kept = bcdl_jax.baselines.expand_masks(params, {name: indices >= 0 for name, indices in assignments.items()})
        masks = jax.tree.map(jnp.logical_and, masks, kept)
        params = bcdl_jax.baselines.apply_masks(params, masks)
    return params, masks, (assignments, levels)
