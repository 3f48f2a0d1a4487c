"""``python -m experiments.parallel_check``: see ``experiments.checks.parallel``."""

import sys

from experiments.checks.parallel import main

if __name__ == "__main__":
    sys.exit(main())
