"""The digits that are shipped with the project, see README.md."""

from pathlib import Path

FILE = Path(__file__).with_name("mnist_5k.npz")
