import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p
from scipy import stats

from bcdl_jax.priors.noise import example_normal, threefry_2x32


def test_threefry_agrees_with_jax(key):
    words = jax.random.bits(key, (4, 1000), jnp.uint32)
    for ours, theirs in zip(jax.jit(threefry_2x32)(*words), threefry2x32_p.bind(*words), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1000, 64), (64, 10, 10, 10)])
def test_numbers_are_standard_normal_and_uncorrelated(key, shape):
    numbers = np.asarray(example_normal(key, shape), np.float64).reshape(shape[0], -1)
    assert stats.kstest(numbers.ravel(), "norm").pvalue > 1e-3
    count = numbers.size
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((numbers**power).mean() - moment) < 5 * np.sqrt((numbers ** (2 * power)).mean() / count)
    for shifted in (numbers[1:, :] * numbers[:-1, :], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean()) < 5 / np.sqrt(shifted.size)
    assert np.isfinite(numbers).all()
    assert len(np.unique(numbers)) > 0.98 * count


def test_noise_of_an_example_depends_on_key_and_index_alone(key):
    compiled = jax.jit(example_normal, static_argnums=1)
    few, many = compiled(key, (3, 4, 5)), compiled(key, (50, 4, 5))
    np.testing.assert_array_equal(few, many[:3])
    assert not np.array_equal(compiled(jax.random.key(1), (3, 4, 5)), few)
    assert len(np.unique(many)) == many.size


def test_numbers_agree_with_the_box_muller_transform(key):
    numbers = np.asarray(example_normal(key, (50, 70)), np.float64)
    words = threefry_2x32(
        *jax.random.key_data(key), jnp.arange(50, dtype=jnp.uint32)[:, None], jnp.arange(70, dtype=jnp.uint32)
    )
    first, second = ((np.asarray(word) >> 9) / 2.0**23 for word in words)
    np.testing.assert_allclose(
        numbers, np.sqrt(-2 * np.log(1 - first)) * np.cos(np.pi * (2 * second - 1)), rtol=1e-5, atol=2e-6
    )


def test_order_of_the_axes_changes_no_number(key):
    usual = example_normal(key, (3, 4, 5, 6))
    moved = example_normal(key, (6, 5, 3, 4), order=(3, 2, 0, 1))
    np.testing.assert_array_equal(usual.transpose(3, 2, 0, 1), moved)


def test_works_under_vmap_with_any_key_and_dtype(key):
    keys = jax.random.split(key, 3)
    together = jax.vmap(lambda k: example_normal(k, (2, 5)))(keys)
    for index in range(3):
        np.testing.assert_array_equal(together[index], example_normal(keys[index], (2, 5)))
    np.testing.assert_array_equal(example_normal(jax.random.key_data(key), (2, 5)), example_normal(key, (2, 5)))
    assert example_normal(jax.random.key(0, impl="rbg"), (2, 5)).shape == (2, 5)
    assert example_normal(key, (2, 5), jnp.bfloat16).dtype == jnp.bfloat16
