import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bcdl_jax.train.losses import GaussianLoss, OwnLoss, SigmoidLoss, SoftmaxLoss, mean_nats


def test_softmax_of_tokens_with_padding(key):
    outputs = jax.random.normal(key, (3, 4, 5))
    targets = jnp.array([[0, 1, 4, -1], [2, -1, -1, -1], [3, 3, 0, 1]])
    loss = SoftmaxLoss(ignore=-1)
    params = loss.start(outputs, targets)
    probabilities = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    expected = [
        -np.log(probabilities[row, place, targets[row, place]])
        for row in range(3)
        for place in range(4)
        if targets[row, place] >= 0
    ]
    assert float(loss.counts(targets).sum()) == len(expected) == 8
    np.testing.assert_allclose(mean_nats(loss, params, outputs, targets), np.mean(expected), rtol=1e-5)
    gradient = jax.grad(lambda outputs: mean_nats(loss, params, outputs, targets))(outputs)
    assert bool((gradient[1, 1:] == 0).all())


def test_sigmoid_and_gaussian_against_scipy(key):
    outputs, targets = jax.random.normal(key, (6, 3)), jax.random.normal(jax.random.key(1), (6, 3))
    labels = (targets > 0).astype(jnp.int32)
    log_probability = scipy.stats.bernoulli.logpmf(labels, 1 / (1 + np.exp(-outputs)))
    nats = SigmoidLoss().nats({}, outputs, labels)
    np.testing.assert_allclose(nats, -log_probability.sum(1), rtol=1e-5)
    loss = GaussianLoss()
    scaled = jnp.array([1.0, 100, 1e-3])
    params = loss.start(outputs * scaled, targets * scaled)
    deviations = np.sqrt(np.mean((targets - outputs) ** 2, 0)) * scaled
    np.testing.assert_allclose(jnp.exp(params["log_deviation"]), deviations, rtol=1e-5)
    expected = -scipy.stats.norm.logpdf(targets * scaled, outputs * scaled, deviations).sum(1)
    np.testing.assert_allclose(loss.nats(params, outputs * scaled, targets * scaled), expected, rtol=1e-5, atol=1e-5)
    # The start is the best deviation.
    gradient = jax.grad(lambda params: mean_nats(loss, params, outputs * scaled, targets * scaled))(params)
    np.testing.assert_allclose(gradient["log_deviation"], 0, atol=1e-5)


def test_an_own_loss_may_return_the_mean_or_one_number_for_each_example(key):
    outputs, targets = jax.random.normal(key, (6, 3)), jnp.ones((6, 3))
    for function in (
        lambda outputs, targets: jnp.mean((outputs - targets) ** 2, -1),
        lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
    ):
        loss = OwnLoss(function)
        assert loss.start(outputs, targets) == {}
        np.testing.assert_allclose(mean_nats(loss, {}, outputs, targets), jnp.mean((outputs - targets) ** 2), rtol=1e-5)


def test_outputs_and_targets_must_fit():
    outputs = jnp.ones((6, 3))
    with pytest.raises(ValueError, match=r"targets of shape \(6, 3\) .*; the targets must be integers of shape \(6,\)"):
        SoftmaxLoss().start(outputs, jnp.ones((6, 3), int))
    with pytest.raises(ValueError, match="type float32; the targets must be integers"):
        SoftmaxLoss().start(outputs, jnp.ones(6))
    for wrong in (-1, 3):
        with pytest.raises(
            ValueError, match=f"has a target {wrong} for 3 classes; targets must be from 0 to 2, or the"
        ):
            SoftmaxLoss().start(outputs, jnp.array([0, 1, 2, wrong, 0, 1]))
    assert SoftmaxLoss(ignore=-1).start(outputs, jnp.array([0, 1, 2, -1, 0, 1])) == {}
    for loss in (SigmoidLoss(), GaussianLoss()):
        with pytest.raises(
            ValueError, match=r"outputs of shape \(6, 3\) and targets of shape \(6,\); both must be equal"
        ):
            loss.start(outputs, jnp.ones(6))
    with pytest.raises(
        ValueError, match=r"loss returns an array of shape \(3,\); it must return the mean .* the 6 examples"
    ):
        OwnLoss(lambda outputs, targets: outputs.mean(0)).start(outputs, jnp.ones(6))
