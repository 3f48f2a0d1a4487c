import json

import numpy as np
import pytest

from experiments.gallery import GALLERY, Examples, store
from experiments.gallery.fit_command import _changing_batches, _pair, main


@pytest.mark.slow
def test_a_network_is_pruned_and_measured(tmp_path):
    pytest.importorskip("plotnine")
    network = GALLERY["tabular"]
    assert main(["tabular", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    content = json.loads((tmp_path / "run" / "tabular_seed0.json").read_text())
    plain = json.loads((store.TRAINED / store.result_name(network)).read_text())
    # The measures of the plain network are those of its own file.
    for part in ("validation", "test"):
        np.testing.assert_allclose(content[part][0], plain[part], rtol=1e-4)
    assert list(content["validation losses"])[:2] == ["plain", "trained"]
    assert (tmp_path / "run" / "tabular_seed0.bcdl").exists()


def test_targets_that_do_not_count_become_padding():
    inputs = np.arange(6).reshape(2, 3)
    found = _pair(Examples(inputs, inputs + 1, np.array([[1, 1, 0], [1, 0, 0]])))
    np.testing.assert_array_equal(found[1], [[1, 2, -1], [4, -1, -1]])


def test_images_change_from_epoch_to_epoch_and_repeat_with_the_seed():
    count = 2 * GALLERY["resnet20"].recipe.batch_size
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(count)
    epochs = [
        list(_changing_batches(GALLERY["resnet20"], images, labels, seed)(number))
        for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert [len(epoch) for epoch in epochs] == [2, 2, 2, 2]
    assert all(sorted(np.concatenate([batch[1] for batch in epoch])) == list(range(count)) for epoch in epochs)
    np.testing.assert_array_equal(epochs[0][0][0], epochs[1][0][0])
    for other in epochs[2:]:
        assert not np.array_equal(epochs[0][0][0], other[0][0])


def test_a_wrong_name_is_refused(capsys):
    assert main(["resnet"]) == 2
    assert "NAME is 'resnet'; allowed are resnet20, " in capsys.readouterr().err
    assert main(["tabular", "--steps", "0"]) == 2
    assert "--steps is 0; it must be at least 1" in capsys.readouterr().err
