import math

import numpy as np
import pytest

from bcdl_jax.codec.range_coder import Decoder, Encoder


@pytest.mark.parametrize("seed", range(50))
def test_the_decoder_inverts_the_encoder_and_the_size_is_the_information(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.choice([0, 1, 2, 5, 50, 2000]))
    probabilities = rng.choice([1, 65535, 32768, *rng.integers(1, 65536, 5)], count).tolist()
    bits = [int(rng.random() < p / 65536) if rng.random() < 0.98 else int(rng.integers(2)) for p in probabilities]
    raw = [(int(rng.integers(0, 2**width)), int(width)) for width in rng.integers(0, 33, 7)]
    encoder = Encoder()
    encoder.encode(bits, probabilities)
    for value, width in raw:
        encoder.encode_raw(value, width)
    encoder.encode(bits, probabilities)
    data = encoder.finish()

    decoder = Decoder(data)
    assert decoder.decode(probabilities) == bits
    assert [decoder.decode_raw(width) for _, width in raw] == [value for value, _ in raw]
    assert decoder.decode(probabilities) == bits
    assert decoder.bytes_beyond_the_end <= 4
    assert decoder.bytes_left == 0
    information = sum(width for _, width in raw) - 2 * sum(
        math.log2(p / 65536 if bit else 1 - p / 65536) for bit, p in zip(bits, probabilities, strict=True)
    )
    assert len(data) <= math.ceil(1.001 * information / 8) + 1
    # Rounding makes zeros a little cheaper.
    assert decoder.bits_read == pytest.approx(information, rel=1e-2, abs=1)


def test_carries_pass_through_many_bytes():
    # The coded number stays just below a power of two for long, and then exceeds it.
    bits = [0] * 12 + [1] * 40 + [0, 1] * 20
    for probability in (1, 2, 255, 65534, 65535):
        probabilities = [probability] * len(bits)
        encoder = Encoder()
        encoder.encode(bits, probabilities)
        assert Decoder(encoder.finish()).decode(probabilities) == bits
