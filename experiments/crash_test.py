"""``python -m experiments.crash_test``: see ``experiments.checks.kill_and_resume``."""

import sys

from experiments.checks.kill_and_resume import main

if __name__ == "__main__":
    sys.exit(main())
