import jax
import numpy as np
import pytest

import bcdl_jax
from experiments import benchmark_inference


def test_the_shrunk_networks_have_the_kept_sizes(capsys):
    for name, widths in (("lenet300", (278, 98, 13)), ("lenet5", (76, 16))):
        case = benchmark_inference.CASES[name]
        images = np.zeros((2, *case.image), np.uint8)
        variables = jax.jit(case.model.init)(jax.random.key(0), images)
        masks = benchmark_inference.masks_of(case, variables, 0)
        pruned = jax.tree.map(np.multiply, variables, masks)
        _, _, report = bcdl_jax.shrink(case.model.apply, pruned, images)
        dense = [leaf.after for leaf in report.leaves if "Dense" in leaf.path and leaf.path.endswith("kernel")]
        assert dense == list(zip(widths, (*widths[1:], 10), strict=True))
    convolutions = [leaf.after for leaf in report.leaves if "Conv" in leaf.path and leaf.path.endswith("kernel")]
    assert convolutions == [(5, 5, 1, 5), (5, 5, 5, 10)]


def test_the_benchmark_prints_all_sides(capsys):
    assert benchmark_inference.main(["--nets", "lenet300", "--rounds", "1", "--seconds", "0.001"]) == 0
    out = capsys.readouterr().out
    assert out.count("x dense") == 9
    assert "LeNet-300-100, GNJ, batch 8192: multiply-adds / 9.29" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--nets", "resnet"], "--nets names resnet; allowed are lenet300"), (["--rounds", "0"], "--rounds is 0")],
)
def test_bad_input_gets_one_sentence(arguments, message, capsys):
    assert benchmark_inference.main(arguments) == 2
    assert message in capsys.readouterr().err
