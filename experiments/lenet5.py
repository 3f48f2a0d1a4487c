"""LeNet-5-Caffe on MNIST: ``python -m experiments.lenet5``. The recipes and their results are in ``experiments/registry/recipes/lenet5.py``."""

from __future__ import annotations

import functools
import sys

from experiments.cli import run
from experiments.registry import EXPERIMENTS

EXPERIMENT = EXPERIMENTS["lenet5"]
main = functools.partial(run.main, EXPERIMENT)

if __name__ == "__main__":
    sys.exit(main())
