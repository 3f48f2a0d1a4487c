"""VGG on CIFAR-10: ``python -m experiments.vgg``. The recipes and their results are in ``experiments/registry/recipes/vgg.py``."""

from __future__ import annotations

import functools
import sys

from experiments.cli import run
from experiments.registry import EXPERIMENTS

EXPERIMENT = EXPERIMENTS["vgg"]
main = functools.partial(run.main, EXPERIMENT)

if __name__ == "__main__":
    sys.exit(main())
