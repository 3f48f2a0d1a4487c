"""``python -m experiments.gallery_fit NAME``: see ``experiments.gallery.fit_command``."""

import sys

from experiments.gallery.fit_command import main

if __name__ == "__main__":
    sys.exit(main())
