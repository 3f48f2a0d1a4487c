"""The names of the pictures of a run. The module does not import JAX, so that --help prints at once."""

from __future__ import annotations

FEATURE_IMPORTANCE = "feature_importance.gif"
SCORES = "log_dropout_rates.png"


def weights_picture(number: int) -> str:
    """The name of the picture of the weights of a layer, which are counted from 1 in the order of the data flow."""
    return f"weights_layer{number}.gif"
