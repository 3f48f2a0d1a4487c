"""VGG on CIFAR-10: ``python -m experiments.vgg``, on a CPU with ``--width 0.25``.

Results on full CIFAR-10 at a quarter of the width, from a copy with JPEG images: the test errors after pruning and after precision reduction,
``rate_paper`` after both, and the minutes for one seed on one CPU core. The pre-trained network has 18.56 % test error. The full table is in
experiments/results/README.md.

    gnj        19.11 %  19.04 %  4.9x  23x  114
    ghs        19.50 %  19.73 %  5.5x  26x  118
    sparse_vd, dc, dns, sws, and the full width: not run

Information is spread over all channels of this network, so that few of them can be pruned at any one time. Each pruning check, one per epoch,
removes one or two tenths of the weights, and the next epoch recovers most of the accuracy: the validation error stays between 18.5 and 21.5 %
until fine-tuning.
"""

from __future__ import annotations

import dataclasses

from experiments.io.dataset_table import EMBEDDED
from experiments.pipeline.pictures import SCORES, weights_picture
from experiments.pipeline.recipe import PlainRecipe, Recipe, Training

PICTURES = (weights_picture(1), weights_picture(2), SCORES)

_FULL = Recipe(
    epochs=14,
    fine_tune_epochs=8,
    learning_rate=4e-3,
    fine_tune_learning_rate=1e-3,
    pretrain_epochs=15,
    pretrain_learning_rate=2e-3,
    mirror=True,
    balanced=True,
    scale_factor=0.03,
    log_variance_factor=3.0,
    warmup_epochs=1,
    kl_weight=0.2,
    fine_tune_averaging_epochs=3,
    fine_tune_kl_weight=0.1,
    max_pruning_change=0.1,
    max_rounding_change=0.005,
    in_turn=True,
    # Few channels can be pruned at any one time, but many small pruning checks together remove most of them.
    max_shrinking_change=0.08,
    regular_shrinking=True,
    least_shrinking_saving=0.01,
)
_PRETRAINED = PlainRecipe(
    epochs=14,
    fine_tune_epochs=3,
    learning_rate=1e-3,
    fine_tune_learning_rate=5e-4,
    pretrain_epochs=15,
    mirror=True,
)
_DECAYED = dataclasses.replace(_PRETRAINED, weight_decay=0.03, levels=(32,) * 14 + (16,))
_RECIPES: dict[str, Training] = {
    "gnj": _FULL,
    # The horseshoe learns the logarithms of its scales, so their learning rate needs no factor. The scales of a layer stay nearly equal, so
    # the log dropout rates do not rank its channels.
    "ghs": dataclasses.replace(_FULL, scale_factor=1.0, score="log_noise_to_signal"),
    # This prior has no scales to balance, and a network whose single weights are pruned does not shrink during training.
    "sparse_vd": dataclasses.replace(
        _FULL,
        learning_rate=1e-3,
        fine_tune_learning_rate=5e-4,
        balanced=False,
        log_variance_factor=6.0,
        warmup_epochs=7,
        max_shrinking_change=None,
    ),
    "dc": dataclasses.replace(_DECAYED, kept=(0.5, *[0.2] * 13, 0.5), rounds=2),
    "dns": dataclasses.replace(_DECAYED, spread=(0.5, *[2.0] * 13, 1.0)),
    "sws": _PRETRAINED,
}
# The recipe for the paper's width, which needs a GPU and has not been run. It trains longer than the narrow one, also shifts the images, and
# takes smaller steps, since their effects add up over four times as many inputs.
_WIDE = dataclasses.replace(
    _FULL,
    epochs=40,
    fine_tune_epochs=15,
    learning_rate=1.5e-3,
    fine_tune_learning_rate=5e-4,
    pretrain_epochs=40,
    shift=4,
    warmup_epochs=2,
    fine_tune_averaging_epochs=5,
    max_pruning_change=0.06,
    max_shrinking_change=0.05,
    first_shrinking=2,
)

RECIPES: dict[str, dict[str, Training]] = {
    method: {"cifar10": recipe, EMBEDDED: dataclasses.replace(recipe, batch_size=32, mirror=False)}
    for method, recipe in _RECIPES.items()
}
QUICK = {"epochs": 2, "fine_tune_epochs": 1, "pretrain_epochs": 1, "warmup_epochs": 0}
FULL_WIDTH: dict[str, dict[str, Training]] = {
    "gnj": {"cifar10": _WIDE},
    "ghs": {"cifar10": dataclasses.replace(_WIDE, scale_factor=1.0, score="log_noise_to_signal")},
}
