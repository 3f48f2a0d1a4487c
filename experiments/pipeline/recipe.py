"""How to train and compress, as data. Imports nothing: the command lines answer --help without waiting for JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Training:
    """What the recipes of all methods have.

    Attributes:
      epochs: of training before pruning, or while pruning.
      fine_tune_epochs: after it.
      batch_size: examples per step.
      learning_rate: of Adam at the start; falls to 0 along a cosine.
      fine_tune_learning_rate: of the fine-tuning: constant for variational networks, falling to 0 along a cosine for plain ones.
      pretrain_epochs: of training the plain twin of the network, whose weights the training starts from; 0 starts it from scratch.
      pretrain_learning_rate: of Adam at the start of the pre-training; falls to 0 along a cosine.
      mirror: whether each training image is mirrored, left to right, half of the time.
      shift: by how many pixels each training image is moved at random, at most, along either axis.
    """

    epochs: int
    fine_tune_epochs: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    fine_tune_learning_rate: float = 2e-3
    pretrain_epochs: int = 0
    pretrain_learning_rate: float = 2e-3
    mirror: bool = False
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe(Training):
    """How to train and compress a variational network; every value was chosen on validation data.

    Attributes:
      kl_weight: weight of the KL once it is warmed up; Bayes' theorem gives 1, a weight below it trades some pruning for a better fit.
      fine_tune_averaging_epochs: over about how many epochs the params are averaged; the average is what fine-tuning gives.
      fine_tune_kl_weight: weight of the KL while fine-tuning, when the groups are chosen.
      balanced: whether training starts with scales as large as the weights, see ``bcdl_jax.balance_scales``.
      scale_factor: how many times larger the steps of the means of the scales are.
      log_variance_factor: how many times larger the steps of all log-variances are.
      fine_tune_log_variance_factor: likewise for the fine-tuning; 0 fine-tunes the means alone.
      tau0: scale of the horseshoe prior of a layer, see ``bcdl_jax.GroupHorseshoe``.
      warmup_epochs: over which the weight of the KL rises from 0 to ``kl_weight``.
      score: what groups are pruned by, "log_dropout_rate" (the paper) or "log_noise_to_signal", the functions of ``bcdl_jax``.
      max_pruning_change: how much pruning may change the predictions on the validation images, before fine-tuning, in nats
        per example, see ``compress.measure_change``.
      max_rounding_change: likewise for the rounding.
      in_turn: whether the seeds are trained one after the other within each epoch, and not all in one program.
      max_shrinking_change: how much leaving out groups, each time, may change the predictions on some of the training images, in nats per
        example, while training goes on without them; None to train at full size throughout. Needs ``in_turn``.
      first_shrinking: epochs before the first look at the groups; the next ones follow after 2, 3, 4, 6, 8, 12 times as many and so on.
      regular_shrinking: whether they follow after 2, 3, 4, 5, 6 times as many instead.
      least_shrinking_saving: share of the multiply-adds that leaving groups out must save, each time.
    """

    kl_weight: float = 1.0
    fine_tune_averaging_epochs: float = 12
    fine_tune_kl_weight: float = 0.6
    balanced: bool = False
    scale_factor: float = 1.0
    log_variance_factor: float = 2.0
    fine_tune_log_variance_factor: float = 2.0
    tau0: float = 1e-5
    warmup_epochs: int = 0
    score: Literal["log_dropout_rate", "log_noise_to_signal"] = "log_dropout_rate"
    max_pruning_change: float = 0.0075
    max_rounding_change: float = 0.001
    in_turn: bool = False
    max_shrinking_change: float | None = None
    first_shrinking: int = 1
    regular_shrinking: bool = False
    least_shrinking_saving: float = 0.25


@dataclasses.dataclass(frozen=True)
class PlainRecipe(Training):
    """How to compress a plain network, weight by weight; values were chosen on validation data where a comment does not say otherwise.

    Fine-tuning trains the levels that the weights share, and the biases. Tuples hold a value per layer, in the order of the data flow, or one
    per round of soft weight-sharing.

    Attributes:
      weight_decay: of AdamW, relative to the learning rate, while pruning.
      dropout: share of the hidden units that is left out at random in pre-training, and in soft weight-sharing; in the retraining of Deep
        Compression less, by the root of the share of weights that are kept [Han et al. 2015, section 3.2].
      levels: how many values the weights of each layer share (Deep Compression, Dynamic Network Surgery).
      kept: shares of the weights that Deep Compression keeps.
      rounds: in how many rounds of pruning and retraining Deep Compression gets there, each by the same factor.
      last_round: share of the epochs that the last round takes, of Deep Compression and of soft weight-sharing; None for (rounds + 1) / (2 * rounds).
      spread: of the thresholds of Dynamic Network Surgery, see ``bcdl_jax.baselines.surgery_thresholds``.
      surgery_decay: the masks are updated at a step t with probability 1 / (1 + surgery_decay * t).
      deviations: of the mixture of soft weight-sharing at the start of each round, see ``bcdl_jax.baselines.create_mixture``.
      prior_weights: for each round, the weight of the mixture's -log p in the loss, 1 in theory [Ullrich et al. 2017 use 0.005].
      components: of the mixture, beside the one at zero.
      zero_proportion: of the component at zero.
      means_learning_rate: of Adam for the means of the mixture.
      mixture_learning_rate: of Adam for its precisions and proportions.
    """

    weight_decay: float = 0.0
    dropout: float = 0.0
    levels: tuple[int, ...] = ()
    kept: tuple[float, ...] = ()
    rounds: int = 1
    last_round: float | None = None
    spread: tuple[float, ...] = ()
    surgery_decay: float = 1e-4
    deviations: tuple[float | None, ...] = (None,)
    prior_weights: tuple[float, ...] = (0.02,)
    components: int = 16
    zero_proportion: float = 0.99
    means_learning_rate: float = 1e-4
    mixture_learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        if not self.deviations or len(self.deviations) != len(self.prior_weights):
            raise ValueError(
                f"deviations has {len(self.deviations)} values and prior_weights {len(self.prior_weights)}; "
                "each must have one for every round, and there must be a round."
            )
        if self.last_round is not None and not 0 < self.last_round <= 1:
            raise ValueError(f"last_round is {self.last_round}; it must be above 0 and at most 1.")
