import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.codec.integer_coding import decode_integers, encode_integers, layout_of, prior_table
from bcdl_jax.codec.range_coder import Decoder, Encoder


def coded(values, row=0, scale=20):
    encoder = Encoder()
    encode_integers(encoder, values, layout_of(row), scale)
    return encoder.finish()


def entropy_bytes(values):
    _, counts = np.unique(values, return_counts=True)
    return -np.sum(counts * np.log2(counts / counts.sum())) / 8


VALUES = {
    "zeros": np.zeros(300, int),
    "one": np.ones(1, int),
    "small": np.random.default_rng(0).integers(-3, 4, 500),
    "wide": np.round(np.random.default_rng(1).normal(size=700) * 1e4).astype(int),
    "extreme": np.array([2**32 - 1, -(2**32 - 1), 0, 1, -1, 2**31, -(2**31), 2**24 + 3]),
    "sparse": np.where(np.random.default_rng(2).random(900) < 0.02, 7, 0),
}


@pytest.mark.parametrize("row", [0, 1, 7, 16, 100, 300])
@pytest.mark.parametrize("name", VALUES)
def test_round_trip(name, row):
    values = VALUES[name]
    for scale in (0, 20, 255):
        data = coded(values, row, scale)
        np.testing.assert_array_equal(decode_integers(Decoder(data), values.size, layout_of(row), scale), values)


@pytest.mark.parametrize("row", [0, 47, 20_000])
def test_round_trip_of_more_than_one_block(row):
    values = np.round(np.random.default_rng(3).laplace(size=70_000) * 5).astype(int)
    data = coded(values, row)
    np.testing.assert_array_equal(decode_integers(Decoder(data), values.size, layout_of(row), 20), values)


@pytest.mark.parametrize("row", [0, 50])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(size=n) * 9,
        lambda rng, n: rng.normal(size=n) * 0.5,
        lambda rng, n: rng.laplace(size=n) * 3,
        lambda rng, n: rng.integers(-60, 60, n),
        lambda rng, n: np.where(rng.random(n) < 0.97, 0, rng.normal(size=n) * 5),
    ],
    ids=["normal", "narrow", "laplace", "uniform", "sparse"],
)
@pytest.mark.parametrize("count", [2000, 10000])
def test_close_to_the_entropy_of_the_histogram(draw, row, count):
    values = np.round(draw(np.random.default_rng(count), count)).astype(int)
    assert len(np.unique(values)) <= 128
    empty = len(bcdl_jax.codec.encode({"a": np.zeros(0, np.int8)}))
    shaped = values.reshape(-1, row) if row else values
    assert len(bcdl_jax.codec.encode({"a": shaped.astype(np.int8)})) - empty <= 1.03 * entropy_bytes(values) + 16


def test_similar_rows_take_less_than_the_entropy():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(200, 40)), axis=0)
    values = np.round(6 * smooth / smooth.std()).astype(int)
    assert len(coded(values.ravel(), 40, 24)) < 0.6 * entropy_bytes(values)


@pytest.mark.parametrize("scale", [0, 8, 24, 60])
def test_the_prior_matches_a_geometric_distribution(scale):
    """The expected values are sums over the distribution."""
    mean = 2 ** (scale >> 3) * (1 + (scale & 7) / 8)
    ratio = 1 - 1 / mean
    table = prior_table(scale) / 65536

    def mass(first, last):  # The probability of the magnitudes first..last.
        return ratio**first - ratio ** (last + 1)

    def near(value):
        return pytest.approx(min(max(value, 1 / 256), 1 - 1 / 256), abs=1e-3)

    assert table[0] == near(ratio)
    assert table[1] == 0.5
    for extra in range(8):
        assert table[2 + extra] == near(ratio ** (2**extra))
    if ratio > 0:
        for extra in range(1, 8):
            for depth in range(min(extra, 3)):
                for prefix in range(1 << depth):
                    width = 2 ** (extra - depth)
                    start = ((1 << depth) + prefix) * width
                    upper = mass(start + width // 2, start + width - 1) / max(mass(start, start + width - 1), 1e-300)
                    if mass(start, start + width - 1) > 1e-12:
                        assert table[40 + 8 * extra + (1 << depth | prefix)] == near(upper)
