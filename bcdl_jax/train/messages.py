"""Sentences for users about the training of one seed: failures, and warnings about pruning."""

from __future__ import annotations

from collections.abc import Sequence

# A KL per example this many times the negative log-likelihood is far from the end of training.
_KL_TIMES_LIKELIHOOD = 100


def failure_sentence(seed: int, epoch: int, step: int, failed_parts: Sequence[str], names: Sequence[str]) -> str:
    """The sentence about a failure: seed, epoch, step, layers and remedies.

    Args:
      seed: The name of the run.
      epoch: The epoch of the failure.
      step: The step of the failure, from 1.
      failed_parts: The names of the parts of the params whose updates were not finite.
      names: The names of all parts.
    """
    if not failed_parts:
        where = "although no layer is at fault (check the loss function and its inputs)"
    elif len(failed_parts) == len(names) and len(names) > 1:
        where = "in all layers (inputs that are not finite, or a learning rate that is too high?)"
    else:
        where = f"in layer{'s' * (len(failed_parts) > 1)} {', '.join(failed_parts)}"
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
      totals: The number of units of each layer. It is 0 for a layer of which ``shrink`` left nothing, which needs no warning.
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
        if count == 0 and totals[name]
    }
    if late and all(kept[name] == totals[name] for name in kept):
        found["network"] = (
            f"Seed {seed}, epoch {epoch}: nothing is pruned yet (all {sum(totals.values())} {units} are kept); train longer, raise the "
            "learning rate of the log-variances, or check num_examples."
        )
    return found


def end_warnings(
    seed: int, epoch: int, kept: dict[str, int], totals: dict[str, int], units: str, nll: float, kl: float
) -> dict[str, str]:
    """Warns, after the last epoch, of single layers that keep all their units, and of a KL far above the likelihood.

    Args:
      seed: The name of the run.
      epoch: The number of the epoch.
      kept: The number of units that each layer would keep.
      totals: The number of units of each layer.
      units: The word for the units: "groups" or "weights".
      nll: The negative log-likelihood per example in nats, mean over the epoch.
      kl: KL / num_examples in nats, mean over the epoch.

    Returns:
      The warnings by subject.
    """
    found = {}
    layers_with_units = {name: count for name, count in kept.items() if totals[name]}
    whole = [name for name, count in layers_with_units.items() if count == totals[name]]
    # A network that prunes nothing, or everything in a layer, has a warning of its own.
    if 0 < len(whole) < len(layers_with_units) and all(layers_with_units.values()):
        layers = ", ".join(f"{name} (all {totals[name]})" for name in whole)
        found["whole layers"] = (
            f"Seed {seed}, epoch {epoch}: training ends and nothing is pruned in layer{'s' * (len(whole) > 1)} {layers}, while other layers "
            f"lose {units}; if its {units} are not all needed, start with balance_scales or prune by the score log_noise_to_signal."
        )
    # At least a hundredth of a nat, since a likelihood may be zero or a density.
    if kl > _KL_TIMES_LIKELIHOOD * max(abs(nll), 0.01):
        found["KL"] = (
            f"Seed {seed}, epoch {epoch}: training ends with a KL of {kl:.3g} nats per example beside a negative log-likelihood of {nll:.3g}, "
            "so few groups can be pruned; train longer, start with balance_scales, or check that num_examples is the size of the training set."
        )
    return found
