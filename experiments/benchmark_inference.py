"""``python -m experiments.benchmark_inference``: see ``experiments.benchmarks.inference``."""

import sys

from experiments.benchmarks.inference import main

if __name__ == "__main__":
    sys.exit(main())
