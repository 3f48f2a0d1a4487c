"""``python -m experiments.gallery_train NAME``: see ``experiments.gallery.command``."""

import sys

from experiments.gallery.command import main

if __name__ == "__main__":
    sys.exit(main())
