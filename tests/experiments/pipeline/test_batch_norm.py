"""Batch norms are folded into the convolutions before them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks.lenet import LeNet5
from experiments.networks.vgg import VGG
from experiments.pipeline import batch_norm

WIDTHS = {"widths": ((3, 4), (5,)), "hidden": 6}


@pytest.fixture(scope="module")
def nets():
    """The twin, the learner, params of the learner whose norms are not the identity, and images."""
    twin = VGG(None, **WIDTHS, batch_norm=False)
    learner = batch_norm.with_batch_norm(twin)
    images = jax.random.randint(jax.random.key(0), (40, 8, 8, 3), 0, 256).astype(jnp.uint8)
    params = jax.jit(learner.init)(jax.random.key(1), images)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return twin, learner, jax.tree.unflatten(structure, moved), images


@pytest.mark.slow
def test_the_folded_network_computes_the_function_of_the_learner(nets):
    twin, learner, params, images = nets
    expected, _ = learner.apply({"params": params}, images, deterministic=False, train=True, mutable=["batch_stats"])
    folded = batch_norm.fold(learner, params, images)
    assert set(folded) == {"Conv_0", "Conv_1", "Conv_2", "Dense_0", "Dense_1"}
    np.testing.assert_allclose(twin.apply({"params": folded}, images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_with_the_norms_of_the_batch(nets):
    _, learner, params, images = nets
    labels = jnp.arange(40) % 10
    logits, _ = learner.apply({"params": params}, images, deterministic=False, train=True, mutable=["batch_stats"])
    expected = -np.mean(np.asarray(jax.nn.log_softmax(logits))[np.arange(40), labels])
    value, slope = jax.jit(
        jax.value_and_grad(lambda p: batch_norm.cross_entropy(learner, p, images, labels, jax.random.key(3)))
    )(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert float(jnp.abs(slope["BatchNorm_0"]["scale"]).max()) > 0


@pytest.mark.slow
def test_batches_mix_images_that_are_sorted_by_class(nets, monkeypatch):
    twin, learner, params, images = nets
    dark_first = jnp.concatenate([images // 8, images])
    monkeypatch.setattr(batch_norm, "_BATCH_SIZE", 20)
    expected, _ = learner.apply(
        {"params": params}, dark_first, deterministic=False, train=True, mutable=["batch_stats"]
    )
    found = twin.apply({"params": batch_norm.fold(learner, params, dark_first)}, dark_first)
    assert float(jnp.abs(found - expected).mean()) < 0.1 * float(jnp.abs(expected).mean())


def test_a_network_without_batch_norms_has_no_learner():
    assert batch_norm.with_batch_norm(LeNet5(None)) is None
