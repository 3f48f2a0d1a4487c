import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import SmallNet, assert_trees_close
from tests.train.helpers import nll


@pytest.mark.slow
def test_many_settings_at_once_are_each_setting_alone(key):
    """The settings are a learning rate within a schedule and a KL weight, in an ensemble with reports."""
    inputs = jax.random.normal(key, (24, 6))
    data = inputs, jnp.argmax(inputs[:, :3], axis=-1)
    settings = [{"rate": rate, "kl_weight": weight} for rate, weight in ((1e-2, 0.1), (3e-2, 0.1), (1e-2, 1.0))]

    def make_step(setting):
        optimizer = optax.adam(lambda step: setting["rate"] * optax.cosine_decay_schedule(1.0, 12)(step))
        return bcdl_jax.train.make_train_step(nll, optimizer, num_examples=24, kl_weight=setting["kl_weight"])

    params = jax.jit(SmallNet().init)(key, inputs)["params"]
    state = bcdl_jax.train.create_train_state(params, optax.adam(lambda step: 1.0), key)
    states = bcdl_jax.train.stack_seeds([bcdl_jax.train.with_setting(state, setting) for setting in settings])
    history = bcdl_jax.train.train_ensemble(
        jax.tree.map(jnp.copy, states),
        data,
        step=bcdl_jax.train.make_step_by_setting(make_step),
        batch_size=8,
        epochs=3,
        validation_error=lambda params, held_out: jnp.float32(0),
        validation_data=data,
        seeds=(0, 1, 2),
    )
    *_, (together, report) = history
    assert len(report.reports) == 3
    train = jax.jit(lambda setting, *inputs: bcdl_jax.train.make_train_epoch(make_step(setting), batch_size=8)(*inputs))
    for index, setting in enumerate(settings):
        alone = state
        for _ in range(3):
            alone, metrics = train(setting, alone, data)
        found = bcdl_jax.train.select_seed(together, index)
        assert_trees_close(found.params, alone.params, rtol=1e-4, atol=1e-6)
        assert_trees_close(found.optimizer_state.optimizer_state, alone.optimizer_state, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(report.reports[index].loss, metrics["loss"], rtol=1e-5)
    means = together.params["Dense_0"]["posterior"].kernel_mean
    assert float(jnp.abs(means[0] - means[1]).max()) > 1e-3
    assert float(jnp.abs(means[0] - means[2]).max()) > 1e-3
