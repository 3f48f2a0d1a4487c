"""``python -m experiments.benchmark_training``: see ``experiments.benchmarks.training``."""

import sys

from experiments.benchmarks.training import main

if __name__ == "__main__":
    sys.exit(main())
