"""The library without implicit promotions of ranks and dtypes, which users may forbid."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax

FAMILIES = [
    bcdl_jax.GroupNormalJeffreys(clip_var=0.1),
    bcdl_jax.GroupHorseshoe(),
    bcdl_jax.SparseVariationalDropout(),
]
CHAIN = ["Conv_0", "Conv_1", "Dense_0"]
IMAGES = jax.random.normal(jax.random.key(0), (6, 8, 8, 2))
LABELS = jnp.arange(6) % 3


class Network(nn.Module):
    """A convolution, a pooling, a grouped convolution and a dense layer."""

    family: bcdl_jax.Family

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = bcdl_jax.Conv(4, (3, 3), family=self.family)(x, deterministic=deterministic)
        x = nn.relu(bcdl_jax.max_pool(x, (2, 2)))
        x = bcdl_jax.Conv(4, (3, 3), feature_group_count=2, family=self.family)(x, deterministic=deterministic)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return bcdl_jax.Dense(3, family=self.family)(x, deterministic=deterministic)


@pytest.fixture(autouse=True)
def no_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_training_and_compression(family, tmp_path):
    model = Network(family)
    params = model.init(jax.random.key(0), IMAGES)["params"]
    params = bcdl_jax.balance_scales(bcdl_jax.from_trained(params, bcdl_jax.mean_weights(params)))

    def nll(params, batch, key):
        logits = model.apply({"params": params}, batch[0], deterministic=False, rngs={"noise": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    optimizer = optax.sgd(1e-2)  # The Adam of optax promotes dtypes itself.
    step = bcdl_jax.train.make_train_step(nll, optimizer, num_examples=len(LABELS))
    state = bcdl_jax.train.create_train_state(params, optimizer, jax.random.key(1))
    for shards in (1, 2):
        epoch = jax.jit(bcdl_jax.train.make_train_epoch(step, batch_size=2, shards=shards))
        state, _ = epoch(state, (IMAGES, LABELS))

    def apply(params, images):
        return model.apply({"params": params}, images)

    error = jax.jit(lambda params: jnp.mean(apply(params, IMAGES) ** 2))
    bcdl_jax.choose_thresholds(state.params, error, max_increase=0.5, chain=CHAIN)
    for score in (bcdl_jax.compression.log_noise_to_signal, bcdl_jax.compression.log_dropout_rate):
        scores = bcdl_jax.compression.pruning_scores(state.params, score)
        thresholds = {name: float(np.median(values)) for name, values in scores.items()}
        pruned = bcdl_jax.prune(state.params, thresholds, CHAIN, score)
    reduced = bcdl_jax.reduce_precision(pruned, bcdl_jax.choose_relative_step(pruned, error, max_increase=0.5))
    bcdl_jax.compression.reduce_precision_by_round_off(pruned)
    assert bcdl_jax.rate(reduced) > bcdl_jax.rate(pruned) > 1
    assert bcdl_jax.compression.rate_paper_maximum(reduced) > 1
    small_apply, small, _ = bcdl_jax.shrink(apply, reduced, IMAGES)
    assert jax.jit(bcdl_jax.for_cpu(small_apply))(small, IMAGES).shape == (6, 3)
    bcdl_jax.save(tmp_path / "model.bcdl", reduced)
    bcdl_jax.load(tmp_path / "model.bcdl", params)
    assignments, levels = bcdl_jax.baselines.share_weights(pruned, 4)
    bcdl_jax.baselines.reduce_to_levels(pruned, assignments, levels)
