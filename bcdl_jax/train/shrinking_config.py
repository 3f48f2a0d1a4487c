"""The configuration of networks that shrink while they are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import ConvertedNetwork, Thresholds, check_chain_or_network
from bcdl_jax.compression.scores import Score, log_dropout_rate
from bcdl_jax.train.state import NegativeLogLikelihood, TrainStep


@dataclasses.dataclass(frozen=True)
class ShrinkingConfig:
    """The times at which a network shrinks while it is trained, and the way in which it shrinks.

    A pruning check finds the groups that can be pruned and masks them. The network shrinks after a check if that saves enough.

    Attributes:
      negative_log_likelihood: The function of the training step.
      make_step: A function from a negative log-likelihood to the training step, such as
        ``lambda nll: make_train_step(nll, optimizer, num_examples=n)``. Each smaller network calls it again.
      thresholds: The score above which a group can be pruned, or one for each layer, see ``prune``; or a function from the params to
        them, such as ``choose_thresholds`` with a small ``max_increase`` and the same score. Choose them more carefully than the final
        thresholds: a group that is masked in training stays masked.
      chain: The order of the layers, see ``prune``.
      first_check: The number of epochs before the first pruning check. The next checks follow after 2, 3, 4, 6, 8, 12, 16, 24, ... times as
        many epochs, since a network loses its groups more and more slowly.
      least_saving: The share of the multiply-adds that a further shrinking must save, since each one compiles a new program.
      multiple_of: A number to whose multiples the kept widths are rounded up, see ``shrink``.
      score: The score of the groups, see ``prune``.
      regular_checks: True for a pruning check after every ``first_check`` epochs, for a network that loses groups throughout its training.
      remove_masked: True to remove masked groups in ``train_ensemble``; False to mask them only and to train at full size. False suits a
        device on which compiling a smaller step takes longer than the step saves, such as a GPU.
      network: The converted network that is trained, in place of ``chain``, see ``prune``; or None. The params of the states must be a tree
        like the network's params.

    Raises:
      ValueError: A number is out of range, or both ``chain`` and ``network`` are given.
    """

    negative_log_likelihood: NegativeLogLikelihood
    make_step: Callable[[NegativeLogLikelihood], TrainStep]
    thresholds: Thresholds | Callable[[PyTree], Thresholds]
    chain: Sequence[str] = ()
    first_check: int = 1
    least_saving: float = 0.25
    multiple_of: int = 8
    score: Score = log_dropout_rate
    regular_checks: bool = False
    remove_masked: bool = True
    network: ConvertedNetwork | None = None

    def __post_init__(self):
        for name in ("first_check", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.least_saving < 1:
            raise ValueError(f"least_saving is {self.least_saving}; it must be at least 0 and less than 1.")
        check_chain_or_network(self.chain, self.network)

    def is_due(self, epochs: int) -> bool:
        """True if a pruning check follows once this number of epochs is complete."""
        times, rest = divmod(epochs, self.first_check)
        while times > 3 and times % 2 == 0:
            times //= 2
        return rest == 0 and (times > 0 if self.regular_checks else times in (1, 2, 3))

    def is_settled(self, epochs: int) -> bool:
        """True once pruning checks are so rare that compiling the validation error for the shrunk network saves time.

        The answer depends on the number of complete epochs alone, so that a resumed run measures the error in the same way.
        """
        return epochs > 4 * self.first_check and not self.regular_checks
