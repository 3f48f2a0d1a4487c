"""Sentences for users about the training of one seed: failures, and warnings about pruning."""

from __future__ import annotations

from collections.abc import Sequence


def failure_sentence(seed: int, epoch: int, step: int, blamed: Sequence[str], names: Sequence[str]) -> str:
    """The sentence about a failure: seed, epoch, step, layers and remedies.

    Args:
      seed: The name of the run.
      epoch: The epoch of the failure.
      step: The step of the failure, from 1.
      blamed: The names of the parts of the params that are to blame.
      names: The names of all parts.
    """
    if not blamed:
        where = "although no layer is at fault (check the loss function and its inputs)"
    elif len(blamed) == len(names) and len(names) > 1:
        where = "in all layers (inputs that are not finite, or a learning rate that is too high?)"
    else:
        where = f"in layer{'s' * (len(blamed) > 1)} {', '.join(blamed)}"
    return (
        f"Seed {seed} was stopped in epoch {epoch}, step {step}: the loss or an update was not finite {where}. "
        "Its last good state is kept; lower the learning rate, clip gradients, or warm up the KL."
    )


def pruning_warnings(
    seed: int, epoch: int, kept: dict[str, int], totals: dict[str, int], units: str, late: bool
) -> dict[str, str]:
    """Warns of layers without a kept unit, and of a network that prunes nothing.

    Args:
      seed: The name of the run.
      epoch: The number of the epoch.
      kept: The number of units that each layer would keep.
      totals: The number of units of each layer.
      units: The word for the units: "groups" or "weights".
      late: True if some pruning can be expected by now.

    Returns:
      The warnings by subject. A warning about the same subject has the same text in each epoch, but for the number of the epoch.
    """
    found = {
        f"layer {name}": f"Seed {seed}, epoch {epoch}: everything would be pruned in layer {name} (none of its {totals[name]} {units} "
        "is below the threshold), and the network's output would no longer depend on its input; use a KL warm-up, a lower learning "
        "rate, or check num_examples."
        for name, count in kept.items()
        if count == 0
    }
    if late and all(kept[name] == totals[name] for name in kept):
        found["network"] = (
            f"Seed {seed}, epoch {epoch}: nothing is pruned yet (all {sum(totals.values())} {units} are kept); train longer, raise the "
            "learning rate of the log-variances, or check num_examples."
        )
    return found
