"""LeNet-300-100 on MNIST: ``python -m experiments.lenet300``.

Results on full MNIST: the test error after precision reduction, ``rate_paper`` after pruning and after precision reduction, and the minutes
of the run with its numbers of seeds and of CPU cores. The full table is in experiments/results/README.md.

    gnj        1.79 %   10x   45x  28, three seeds, one core
    ghs        1.79 %    9x   40x  29, three seeds, one core
    sparse_vd  1.87 %   23x  109x  19, three seeds, one core
    dc         1.65 %    6x   41x   1, one seed, two cores
    dns        1.84 %   32x  205x   2, one seed, one core
    sws        1.85 %   13x   84x   8, one seed, one core
"""

from __future__ import annotations

import dataclasses

from experiments.io.dataset_table import EMBEDDED
from experiments.pipeline.pictures import FEATURE_IMPORTANCE, SCORES, weights_picture
from experiments.pipeline.recipe import PlainRecipe, Recipe, Training

PICTURES = (weights_picture(1), weights_picture(2), FEATURE_IMPORTANCE, SCORES)

_FULL = Recipe(
    epochs=180,
    fine_tune_epochs=60,
    fine_tune_learning_rate=2e-4,
    warmup_epochs=50,
    kl_weight=0.8,
    fine_tune_kl_weight=0.1,
)
_EMBEDDED = dataclasses.replace(
    _FULL,
    epochs=100,
    fine_tune_epochs=30,
    batch_size=32,
    learning_rate=1e-3,
    fine_tune_learning_rate=2e-3,
    kl_weight=1.0,
    fine_tune_kl_weight=0.6,
    log_variance_factor=4.0,
    fine_tune_averaging_epochs=6,
    max_pruning_change=0.01,
    max_rounding_change=0.002,
)

_SPARSE = dataclasses.replace(
    _FULL,
    epochs=150,
    fine_tune_epochs=25,
    log_variance_factor=4.0,
    kl_weight=0.6,
    max_pruning_change=0.004,
    max_rounding_change=0.0005,
)

_PRETRAINED = PlainRecipe(epochs=60, fine_tune_epochs=5, fine_tune_learning_rate=5e-4, pretrain_epochs=20)
_LEVELS = (32, 32, 16)
_PLAIN: dict[str, dict[str, Training]] = {
    "dc": {
        "mnist": dataclasses.replace(
            _PRETRAINED, weight_decay=0.03, dropout=0.1, levels=_LEVELS, kept=(0.075, 0.1, 0.4), rounds=3
        ),
    },
    "dns": {
        "mnist": dataclasses.replace(_PRETRAINED, weight_decay=0.05, levels=_LEVELS, spread=(5.5, 4.3, 1.3)),
        # This prunes less, since the retraining has few steps. The values are not tuned.
        EMBEDDED: dataclasses.replace(_PRETRAINED, weight_decay=0.05, levels=_LEVELS, spread=(3.0, 2.5, 1.0)),
    },
    "sws": {
        "mnist": dataclasses.replace(
            _PRETRAINED,
            epochs=90,
            learning_rate=1e-3,
            weight_decay=0.05,
            dropout=0.1,
            components=24,
            zero_proportion=0.99999,
            deviations=(0.024, 0.033, 0.013),
            prior_weights=(0.03, 0.03, 0.002),
            mixture_learning_rate=1e-4,
        ),
        # One round, since each round has few steps. The values are not tuned.
        EMBEDDED: dataclasses.replace(_PRETRAINED, learning_rate=1e-3),
    },
}

RECIPES: dict[str, dict[str, Training]] = {
    **_PLAIN,
    # More epochs and a smaller KL weight fit better and prune as much.
    "gnj": {"mnist": dataclasses.replace(_FULL, epochs=260, kl_weight=0.7), EMBEDDED: _EMBEDDED},
    # This prunes half of the groups that training leaves; fine-tuning restores the accuracy.
    "ghs": {"mnist": dataclasses.replace(_FULL, max_pruning_change=0.13), EMBEDDED: _EMBEDDED},
    "sparse_vd": {"mnist": _SPARSE, EMBEDDED: _EMBEDDED},
}
QUICK = {"epochs": 3, "fine_tune_epochs": 1, "warmup_epochs": 0}
