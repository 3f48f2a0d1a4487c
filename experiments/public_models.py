"""``python -m experiments.public_models``: see ``experiments.checks.public_models.command``."""

import sys

from experiments.checks.public_models.command import main

if __name__ == "__main__":
    sys.exit(main())
