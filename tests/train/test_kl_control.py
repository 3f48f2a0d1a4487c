import math

import pytest

from bcdl_jax.train.kl_control import KLControl


@pytest.mark.parametrize("slope", [0.02, 1.0, 30.0])
def test_the_loss_reaches_its_aim(slope):
    """In a network whose loss rises with the KL weight, with a delay."""
    control = KLControl(base=0.5, aim=0.8, most=math.inf)
    weight, loss, losses = 0.05, 0.5, []
    for _ in range(400):
        loss += 0.2 * (0.5 + slope * weight - loss)
        weight = control.next_weight(weight, loss)
        losses.append(loss)
    assert abs(sum(losses[-50:]) / 50 - 0.8) < 0.03
    assert max(losses[-50:]) - min(losses[-50:]) < 0.1


def test_the_weight_stays_within_its_limits():
    control = KLControl(base=0.0, aim=0.1, most=0.3)
    weight = 0.25
    for _ in range(5):
        weight = control.next_weight(weight, 0.0)
    assert weight == 0.3
    for _ in range(100):
        weight = control.next_weight(weight, 1e9)
    assert 0 < weight < 1e-3
    assert control.next_weight(0.1, -1e30) <= 0.3
