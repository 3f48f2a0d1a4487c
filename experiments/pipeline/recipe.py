"""Recipes: the settings of training and compression. The module does not import JAX, so that --help prints at once."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Self


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings that all methods share.

    Attributes:
      variational: True for the settings of a variational network, False for those of a plain method.
      epochs: The number of epochs of training before pruning, or during pruning for plain methods.
      fine_tune_epochs: The number of epochs after pruning.
      batch_size: The number of examples per step.
      learning_rate: The learning rate of Adam at the start of training. It falls to 0 along a cosine.
      fine_tune_learning_rate: The learning rate of fine-tuning. It is constant for variational networks, and falls to 0 along a cosine for
        plain ones.
      pretrain_epochs: The number of epochs of pre-training, which trains the plain twin of the network. Training starts from its weights;
        0 to start from scratch.
      pretrain_learning_rate: The learning rate of Adam at the start of pre-training. It falls to 0 along a cosine.
      mirror: True to mirror each training image left to right with probability 1/2.
      shift: The largest random shift of a training image along each axis, in pixels.
    """

    variational: ClassVar[bool]

    epochs: int
    fine_tune_epochs: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    fine_tune_learning_rate: float = 2e-3
    pretrain_epochs: int = 0
    pretrain_learning_rate: float = 2e-3
    mirror: bool = False
    shift: int = 0

    # The settings of one subclass that others read too. As properties, they are no entries of the recipe in a result file.

    @property
    def dropout(self) -> float:
        """The dropout rate of the hidden units in pre-training; 0 for variational networks."""
        return 0.0

    @property
    def warmup_epochs(self) -> int:
        """The number of epochs of the KL warm-up; 0 for plain methods."""
        return 0

    @property
    def max_shrinking_change(self) -> float | None:
        """The largest change of the predictions that each removal of groups may cause during training; None for plain methods."""
        return None

    def at_full_size(self) -> Self:
        """These settings for a network that keeps its full size during training."""
        return self


@dataclasses.dataclass(frozen=True)
class Recipe(Training):
    """The settings of a variational network.

    The values were chosen on validation data, except where experiments/README.md says otherwise.

    Attributes:
      kl_weight: The weight of the KL divergence after its warm-up. Bayes' theorem gives 1; a smaller weight prunes less and fits better.
      fine_tune_averaging_epochs: The number of epochs, approximately, over which fine-tuning averages the params. The average is its result.
      fine_tune_kl_weight: The weight of the KL divergence in fine-tuning, after the groups are chosen.
      balanced: True to balance the scales at the start of training, see ``bcdl_jax.balance_scales``.
      scale_factor: The factor of the learning rate for the means of the scales.
      log_variance_factor: The factor of the learning rate for all log-variances.
      fine_tune_log_variance_factor: The factor of the learning rate for all log-variances in fine-tuning; 0 fine-tunes the means alone.
      tau0: The scale of a layer's horseshoe prior, see ``bcdl_jax.GroupHorseshoe``.
      warmup_epochs: The number of epochs in which the weight of the KL divergence rises from 0 to ``kl_weight``.
      score: The score that groups are pruned by, the name of a function of ``bcdl_jax.compression``: "log_dropout_rate", the paper's score, or
        "log_noise_to_signal".
      max_pruning_change: The largest change of the predictions on the validation images that pruning may cause before fine-tuning, in nats per
        example, see ``measures.measure_change``.
      max_rounding_change: The largest change of the predictions on the validation images that rounding may cause, in nats per example.
      in_turn: True to train the seeds one after the other within each epoch; False for one program for all seeds.
      max_shrinking_change: The largest change of the predictions on some training images that each removal of groups may cause during
        training, in nats per example; None to train at full size to the end. It needs ``in_turn``.
      first_shrinking: The number of epochs before the first pruning check. The next checks follow after 2, 3, 4, 6, 8, 12, ... times as many.
      regular_shrinking: True for checks after 2, 3, 4, 5, 6, ... times ``first_shrinking`` epochs instead.
      least_shrinking_saving: The smallest share of the multiply-adds that each removal of groups must save.
    """

    variational = True

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

    def at_full_size(self) -> Self:
        return dataclasses.replace(self, max_shrinking_change=None)


@dataclasses.dataclass(frozen=True)
class PlainRecipe(Training):
    """The settings of a plain method, which compresses weight by weight. Values were chosen on validation data unless a comment says otherwise.

    Fine-tuning trains the biases and the levels, the values that the weights of a layer share. Tuples hold one value per layer, in the order
    of the data flow, or one per round of soft weight-sharing.

    Attributes:
      weight_decay: The weight decay of AdamW during pruning, relative to the learning rate.
      dropout: The dropout rate of the hidden units in pre-training and in soft weight-sharing. In the retraining of Deep Compression it is
        multiplied by the square root of the share of kept weights [H15 section 3.2].
      levels: The numbers of levels per layer (Deep Compression, Dynamic Network Surgery).
      kept: The shares of weights per layer that Deep Compression keeps.
      rounds: The number of rounds of pruning and retraining in Deep Compression. Each round multiplies the share of kept weights by the same
        factor.
      last_round: The share of the epochs that the last round of Deep Compression and of soft weight-sharing takes; None for
        (rounds + 1) / (2 * rounds).
      spread: The spread of the thresholds of Dynamic Network Surgery per layer, see ``bcdl_jax.baselines.surgery_thresholds``.
      surgery_decay: The decay of the updates of the masks. Step t updates them with probability 1 / (1 + surgery_decay * t).
      deviations: The standard deviations of the mixture of soft weight-sharing at the start of each round, see
        ``bcdl_jax.baselines.create_mixture``.
      prior_weights: The weights of the mixture's -log p in the loss, per round. Theory gives 1; [U17] use 0.005.
      components: The number of components of the mixture, without the component at zero.
      zero_proportion: The mixing proportion of the component at zero.
      means_learning_rate: The learning rate of Adam for the means of the mixture.
      mixture_learning_rate: The learning rate of Adam for the precisions and the proportions of the mixture.
    """

    variational = False

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
                "each must have one value per round, for at least one round."
            )
        if self.last_round is not None and not 0 < self.last_round <= 1:
            raise ValueError(f"last_round is {self.last_round}; it must be more than 0 and at most 1.")
