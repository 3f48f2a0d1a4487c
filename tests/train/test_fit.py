import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax import train

CONFIG = train.FitConfig(steps=500, rounds=2, round_steps=50, fine_tune_steps=100, batch_size=64)


def network(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["last"]


def problem(key, examples=1500):
    """Inputs of which three out of ten matter, the params of a trained network, and a function of the outputs alone."""
    x = jax.random.normal(key, (examples, 10))
    keys = jax.random.split(key)
    first = jnp.zeros((10, 8)).at[:3].set(jax.random.normal(keys[0], (3, 8)))
    noise = 0.02 * jax.random.normal(keys[1], first.shape)
    params = {"first": first, "bias": jnp.zeros(8), "last": jax.random.normal(keys[1], (8, 2))}
    outputs = network(params, x)
    return x, outputs, params | {"first": first + noise}


@pytest.fixture(scope="module")
def regression(key):
    """(data, validation, plain params, the result of fit) with raw targets of a large scale."""
    x, outputs, params = problem(key)
    params = params | {"last": 1000 * params["last"]}
    targets = 1000 * (outputs + 0.1 * jax.random.normal(key, outputs.shape))
    data, validation = (x[:1000], targets[:1000]), (x[1000:], targets[1000:])
    model = bcdl_jax.variational(network, params, x[:2])
    return (
        model,
        data,
        validation,
        train.fit(model, train.GaussianLoss(), data, validation, config=CONFIG, progress=False),
    )


def test_useless_inputs_go_and_the_loss_stays(regression):
    model, (x, _), (inputs, targets), result = regression
    mask = result.params["first"].input_mask
    assert bool((mask[:3] > 0).all())
    assert float(mask[3:].sum()) == 0
    assert list(result.losses)[:3] == ["plain", "trained", "pruned"]
    # 0.03 nats for each of the two targets are about 3 % of the deviation.
    assert list(result.losses.values())[-1] < result.losses["plain"] + 0.06
    outputs = model.apply(result.params, inputs)
    deviation = np.exp(result.loss_params["log_deviation"])
    np.testing.assert_allclose(np.std(outputs - targets, axis=0), deviation, rtol=0.2)
    assert result.kept_weights[1] == 96
    assert str(result).startswith(f"{result.kept_weights[0]} of 96 weights")
    _, _, report = bcdl_jax.shrink(model.apply, result.params, x[:2])
    assert report.multiply_adds[1] <= 0.5 * report.multiply_adds[0]


def test_a_new_network_is_trained_with_a_given_kl_weight_and_pruning_checks(key, capsys):
    x, outputs, params = problem(key)
    params = jax.tree.map(lambda array: 0.5 * jax.random.normal(key, array.shape), params)
    targets = outputs + 0.1 * jax.random.normal(key, outputs.shape)
    data, validation = (x[:1000], targets[:1000]), (x[1000:], targets[1000:])
    model = bcdl_jax.variational(network, params, x[:2])
    config = train.FitConfig(
        steps=600,
        learning_rate=2e-2,
        kl_weight=1.0,
        warmup_steps=200,
        check_steps=200,
        rounds=0,
        fine_tune_steps=0,
        batch_size=64,
    )
    seen = []
    result = train.fit(
        model, train.GaussianLoss(), data, validation, config=config, callback=lambda *each: seen.append(each)
    )
    np.testing.assert_allclose([report.kl_weight for report in result.reports[:5]], [0.25, 0.5, 0.75, 1, 1])
    assert [report for _, report in seen] == list(result.reports)
    assert result.losses["trained"] < result.losses["plain"] - 1
    # The last params are those of the result: no round follows.
    jax.tree.map(np.testing.assert_array_equal, seen[-1][0], result.params)
    kept = [int(params["first"].input_mask.sum()) for params, _ in seen]
    assert kept[0] == 10
    assert kept[-1] == result.params["first"].input_mask.sum() < 10
    assert bool((result.params["first"].input_mask[:3] > 0).all())
    assert "weights are kept from step" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_key_gives_the_same_result(key):
    x, outputs, params = problem(key, 200)
    model = bcdl_jax.variational(network, params, x[:2])
    data, validation = ((x[part], jnp.argmax(outputs[part], -1)) for part in (slice(0, 150), slice(150, 200)))
    config = train.FitConfig(steps=12, rounds=1, round_steps=3, fine_tune_steps=4, batch_size=32, steps_per_report=5)
    results = [
        train.fit(model, train.SoftmaxLoss(), data, validation, key=jax.random.key(seed), config=config, progress=False)
        for seed in (1, 1, 2)
    ]
    same, other = (
        jax.tree.map(lambda one, two: bool((one == two).all()), results[0].params, result.params)
        for result in results[1:]
    )
    assert all(jax.tree.leaves(same))
    assert not all(jax.tree.leaves(other))
    assert [report.step for report in results[0].reports] == [5, 10, 12, 3, 4]


def test_integers_and_frozen_arrays_stay(key):
    x, outputs, params = problem(key, 100)

    def apply(params, x):
        return network(params, x[:, params["order"]]) * params["gain"] + params["shift"]

    params = params | {"order": jnp.arange(10), "gain": jnp.ones(()), "shift": jnp.zeros(())}
    model = bcdl_jax.variational(apply, params, x[:2])
    config = train.FitConfig(steps=3, rounds=0, fine_tune_steps=0, batch_size=32)
    options = {"config": config, "progress": False}
    squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, -1)  # noqa: E731
    result = train.fit(model, squares, (x, outputs), (x, outputs), frozen=["gain"], **options)
    np.testing.assert_array_equal(result.params["order"], jnp.arange(10))
    assert float(result.params["gain"]) == 1
    assert float(result.params["shift"]) != 0
    # Of the variables of Flax, only the params are trained.
    variables = {"params": {name: params[name] for name in ("first", "bias", "last", "gain")}, "stats": params["shift"]}
    flat = lambda variables, x: network(variables["params"], x) * variables["params"]["gain"] + variables["stats"]  # noqa: E731
    flax_model = bcdl_jax.variational(flat, variables, x[:2])
    assert flax_model.plan.leaves[-1].reason is not None
    result = train.fit(flax_model, squares, (x, outputs), (x, outputs), **options)
    assert float(result.params["stats"]) == 0
    assert float(result.params["params"]["gain"]) != 1
    with pytest.raises(ValueError, match="frozen holds 'first', which is found in no path of a plain array"):
        train.fit(model, squares, (x, outputs), (x, outputs), frozen=["first"], **options)


def test_bad_input_is_refused(key):
    x, outputs, params = problem(key, 100)
    model = bcdl_jax.variational(network, params, x[:2])
    loss, data = train.GaussianLoss(), (x, outputs)
    with pytest.raises(ValueError, match="validation is or holds a ArrayImpl; it must be a pair of inputs and targets"):
        train.fit(model, loss, data, [x, outputs])
    with pytest.raises(ValueError, match=r"The arrays of data have \[50, 100\] examples"):
        train.fit(model, loss, (x, outputs[:50]), data)
    with pytest.raises(ValueError, match="The loss of the trained network is nan on data"):
        train.fit(model, loss, (x.at[0].set(jnp.nan), outputs), data, progress=False)
    with pytest.raises(ValueError, match="learning_rate is -1; it must be above 0 and finite"):
        train.FitConfig(learning_rate=-1)
    with pytest.raises(ValueError, match="network is a function; it must have params and apply"):
        train.fit(network, loss, data, (x, outputs))
    with pytest.raises(ValueError, match=r"loss is <class .*; it must be a loss such as SoftmaxLoss\(\)"):
        train.fit(model, train.GaussianLoss, data, (x, outputs))
    with pytest.raises(ValueError, match="config is a dict; it must be a FitConfig"):
        train.fit(model, loss, data, (x, outputs), config={"steps": 3})
    with pytest.raises(ValueError, match="validation is data itself; it must hold examples"):
        train.fit(model, loss, data, data)
    with pytest.raises(ValueError, match="check_steps is 70; it must be a multiple of steps_per_report, 50"):
        train.FitConfig(check_steps=70)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1 and finite"):
        train.FitConfig(batch_size=0)
