"""LeNet-5-Caffe on MNIST: ``python -m experiments.lenet5``.

Results on full MNIST: the test error after precision reduction, ``rate_paper`` after pruning and after precision reduction, and the minutes
of the run with its numbers of seeds and of CPU cores. The full table is in experiments/results/README.md.

    gnj        0.91 %  183x  825x  18, two seeds, two cores
    ghs        0.96 %  164x  764x  49, two seeds, one core
    sparse_vd  0.80 %  101x  585x  43, one seed, one core
    dc         0.75 %    7x   45x   4, one seed, one core
    dns        0.87 %   56x  363x   4, one seed, one core
    sws        0.91 %  103x  827x  16, one seed, one core
"""

from __future__ import annotations

import dataclasses

from experiments.io.dataset_table import EMBEDDED
from experiments.pipeline.pictures import SCORES, weights_picture
from experiments.pipeline.recipe import PlainRecipe, Recipe, Training

PICTURES = (weights_picture(1), weights_picture(2), weights_picture(3), SCORES)

_FULL = Recipe(
    epochs=80,
    fine_tune_epochs=40,
    log_variance_factor=6.0,
    warmup_epochs=1,
    fine_tune_averaging_epochs=6,
    pretrain_epochs=3,
    in_turn=True,
    max_shrinking_change=0.001,
)
_EMBEDDED = dataclasses.replace(
    _FULL, batch_size=32, learning_rate=1e-3, max_pruning_change=0.01, max_rounding_change=0.002
)

_PRETRAINED = PlainRecipe(epochs=14, fine_tune_epochs=3, fine_tune_learning_rate=5e-4, pretrain_epochs=5)
_LEVELS = (32, 32, 32, 16)
_PLAIN: dict[str, dict[str, Training]] = {
    "dc": {
        "mnist": dataclasses.replace(
            _PRETRAINED, weight_decay=0.03, levels=_LEVELS, kept=(0.6, 0.12, 0.07, 0.2), rounds=2
        ),
    },
    "dns": {
        "mnist": dataclasses.replace(_PRETRAINED, weight_decay=0.03, levels=_LEVELS, spread=(0.45, 3.9, 7.7, 2.9)),
        # This prunes less, since the retraining has few steps. The values are not tuned.
        EMBEDDED: dataclasses.replace(_PRETRAINED, weight_decay=0.03, levels=_LEVELS, spread=(0.0, 2.0, 4.0, 2.0)),
    },
    "sws": {
        "mnist": dataclasses.replace(
            _PRETRAINED,
            epochs=60,
            learning_rate=1e-3,
            weight_decay=0.03,
            dropout=0.1,
            zero_proportion=0.99999,
            deviations=(0.012, 0.018, 0.024, 0.03, 0.036, 0.042, 0.01),
            prior_weights=(0.03, 0.03, 0.03, 0.03, 0.03, 0.03, 0.002),
            last_round=0.2,
            mixture_learning_rate=1e-4,
        ),
        # One round, since each round has few steps. The values are not tuned.
        EMBEDDED: dataclasses.replace(_PRETRAINED, learning_rate=1e-3),
    },
}

RECIPES: dict[str, dict[str, Training]] = {
    **_PLAIN,
    "gnj": {"mnist": _FULL, EMBEDDED: _EMBEDDED},
    "ghs": {"mnist": dataclasses.replace(_FULL, max_rounding_change=0.0008), EMBEDDED: _EMBEDDED},
    # A network whose single weights are pruned does not shrink during training.
    "sparse_vd": {
        "mnist": dataclasses.replace(
            _FULL,
            epochs=50,
            fine_tune_epochs=15,
            kl_weight=0.7,
            max_pruning_change=0.005,
            max_rounding_change=0.0005,
            max_shrinking_change=None,
        ),
        EMBEDDED: dataclasses.replace(_EMBEDDED, max_shrinking_change=None),
    },
}
QUICK = {"epochs": 2, "fine_tune_epochs": 1, "pretrain_epochs": 1, "warmup_epochs": 0}
