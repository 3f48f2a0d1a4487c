"""``python -m experiments.benchmark_shrinking``: see ``experiments.benchmarks.shrinking``."""

import sys

from experiments.benchmarks.shrinking import main

if __name__ == "__main__":
    sys.exit(main())
