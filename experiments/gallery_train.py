"""``python -m experiments.gallery_train NAME``: see ``experiments.gallery.train_command``."""

import sys

from experiments.gallery.train_command import main

if __name__ == "__main__":
    sys.exit(main())
