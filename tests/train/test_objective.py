import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax


def test_negative_elbo_divides_the_kl_by_the_number_of_examples(net):
    _, params, _ = net
    kl = float(bcdl_jax.kl_divergence(params))
    assert float(bcdl_jax.negative_elbo(jnp.float32(0.7), params, num_examples=50)) == pytest.approx(
        0.7 + kl / 50, rel=1e-6
    )
    assert float(bcdl_jax.negative_elbo(jnp.float32(0.7), params, num_examples=50, kl_weight=0.1)) == pytest.approx(
        0.7 + kl / 500, rel=1e-6
    )


@pytest.mark.parametrize("num_examples", [0, -3, float("nan"), float("inf")])
def test_num_examples_must_be_positive(net, num_examples):
    with pytest.raises(ValueError, match=r"num_examples is .*; it must be the number of training examples, at least 1"):
        bcdl_jax.negative_elbo(jnp.float32(0), net[1], num_examples=num_examples)


def test_num_examples_is_required(net):
    with pytest.raises(TypeError, match="num_examples"):
        bcdl_jax.negative_elbo(jnp.float32(0), net[1])


def test_warm_up_schedules():
    steps = np.arange(0, 16)
    linear = [float(bcdl_jax.kl_warmup(10, delay=3)(step)) for step in steps]
    np.testing.assert_allclose(linear, np.clip((steps - 3) / 10, 0, 1), atol=1e-6)
    cosine = [float(bcdl_jax.kl_warmup(10, "cosine")(step)) for step in steps]
    np.testing.assert_allclose(cosine, 0.5 - 0.5 * np.cos(np.pi * np.clip(steps / 10, 0, 1)), atol=1e-6)
    assert [float(bcdl_jax.kl_warmup(0, delay=2)(step)) for step in (1, 2)] == [0, 1]
    assert float(jax.jit(bcdl_jax.kl_warmup(10))(jnp.int32(5))) == 0.5
    for shape in ("linear", "cosine"):
        tempered = bcdl_jax.kl_warmup(10, shape, to=0.4)
        assert [round(float(tempered(step)), 6) for step in (0, 5, 10, 99)] == [0, 0.2, 0.4, 0.4]
    assert float(bcdl_jax.kl_warmup(0, to=0.4)(0)) == pytest.approx(0.4)


def test_warm_up_refuses_nonsense():
    with pytest.raises(ValueError, match="both must be 0 or more"):
        bcdl_jax.kl_warmup(-1)
    with pytest.raises(ValueError, match="must be 'linear' or 'cosine'"):
        bcdl_jax.kl_warmup(1, "square")
    for weight in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"to is .*; it must be a finite number of 0 or more"):
            bcdl_jax.kl_warmup(1, to=weight)
