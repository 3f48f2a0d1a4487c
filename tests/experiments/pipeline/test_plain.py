import dataclasses
import json

import jax
import numpy as np
import pytest

import bcdl_jax
from experiments import lenet5, lenet300, registry, vgg
from experiments.io import data
from experiments.networks.lenet import LeNet300
from experiments.pipeline import measures, plain_methods
from experiments.pipeline.plain_work import PlainWork
from experiments.pipeline.recipe import PlainRecipe
from experiments.report import scoring
from experiments.report.run_table import print_table
from tests.experiments.small_data import SAMPLE_IMAGES, few_digits

METHODS = ("dc", "dns", "sws")


@pytest.fixture(
    scope="module", params=["dns", *(pytest.param(method, marks=pytest.mark.slow) for method in ("dc", "sws"))]
)
def finished(request, tmp_path_factory):
    """A run of LeNet-300-100 on a few digits: the method, the output directory and the data set."""
    out = tmp_path_factory.mktemp("runs") / request.param
    dataset = few_digits(256, 64, 128)
    arguments = ["--dataset", "mnist_5k", "--method", request.param, "--quick", "--epochs", "3", "--seeds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: dataset)
        assert lenet300.main([*arguments, "--pretrain-epochs", "8", "--out", str(out)]) == 0
        patch.undo()
    return request.param, out, dataset


@pytest.mark.slow
def test_the_file_holds_the_network_that_was_scored(finished):
    """NumPy computes the error again from the decoded file."""
    _, out, dataset = finished
    (run,) = json.loads((out / "result.json").read_text())["runs"]
    like = jax.eval_shape(LeNet300().init, jax.random.key(0), SAMPLE_IMAGES)["params"]
    net = bcdl_jax.load(out / "compressed_seed2.bcdl", like)
    hidden = (dataset.test.images / 127.5 - 1).reshape(len(dataset.test), -1)
    for number, name in enumerate(lenet300.EXPERIMENT.network.chain):
        layer = net[name]["posterior"]
        assert layer.prunes_weights
        kernel, bias = map(np.asarray, layer.mean_weights())
        assert len(np.unique(kernel[kernel != 0])) <= 32
        hidden = hidden @ kernel + bias
        hidden = np.maximum(hidden, 0) if number < 2 else hidden
    error = 100 * np.mean(np.argmax(hidden, -1) != dataset.test.labels)
    assert error == pytest.approx(run["test_error"]["reduced"], abs=0.8)  # Logits can be equal up to rounding.
    assert (out / "compressed_seed2.bcdl").stat().st_size == run["file_bytes"]


@pytest.mark.slow
def test_rates_follow_from_the_kept_weights(finished):
    method, out, _ = finished
    result = json.loads((out / "result.json").read_text())
    (run,) = result["runs"]
    assert (result["method"], run["thresholds"], run["round_off_rule"]) == (method, None, None)
    with np.load(out / "pruned_seed2.npz") as arrays:
        kept = sum(
            int(np.count_nonzero(arrays[f"{name}/weight_mask"] * arrays[f"{name}/output_mask"]))
            for name in lenet300.EXPERIMENT.network.chain
        )
    assert run["kept_weights"] == kept < run["total_weights"] == 266_200
    assert run["rate_paper"]["pruned"] == pytest.approx(266_200 / (2 * kept), rel=1e-5)
    assert min(run["rate_paper"]["maximum"], run["rate_paper"]["reduced"]) > run["rate_paper"]["pruned"]
    assert set(run["uncertainty"]) == {"mean", "compressed"}
    if method == "dc":
        shares = lenet300.EXPERIMENT.recipe("mnist_5k", method="dc").kept
        sizes = (784 * 300, 300 * 100, 100 * 10)
        most = sum(round(share * size) for share, size in zip(shares, sizes, strict=True))
        assert 0.9 * most <= kept <= most  # Units without inputs or outputs lose their other weights too.


@pytest.mark.slow
def test_the_summary_names_the_pre_trained_network_once(finished, capsys):
    _, out, _ = finished
    runs = json.loads((out / "result.json").read_text())["runs"]
    print_table(runs, plain=True)
    header, _, *lines = capsys.readouterr().out.splitlines()
    stages = ["after pre-training", "after pruning", "after precision reduction"]
    assert [line[6:32].strip() for line in lines[:3]] == stages
    assert header.split()[-8:-5] == ["%", "rate_paper", "rate"]
    assert lines[2].split()[-4:-2] == [f"{runs[0][rate]['reduced']:.1f}x" for rate in ("rate_paper", "rate")]
    assert "trained" not in lines[-1].replace("pretrained", "")


@pytest.mark.slow
def test_metrics_have_the_number_of_kept_weights(finished):
    _, out, _ = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["pretrain"] * 8 + ["train"] * 3 + ["fine_tune"]
    kept = [line["kept_weights"] for line in lines if line["phase"] != "pretrain"]
    assert kept[-1] < 266_200
    assert all(np.isfinite(line["loss"]) for line in lines)


ROUNDS = PlainRecipe(
    epochs=12,
    fine_tune_epochs=0,
    batch_size=32,
    deviations=(0.01, 0.02, 0.005),
    prior_weights=(0.001, 0.001, 0.0001),
    zero_proportion=0.999,
)


@pytest.mark.slow
def test_soft_weight_sharing_prunes_in_rounds(key):
    """Weights that a round sets to zero stay zero. The wider mixture of the second round prunes further weights."""
    dataset = few_digits(256, 64, 128)
    twin = LeNet300(family=None)
    params = twin.init(key, SAMPLE_IMAGES)["params"]
    seen = []

    def show(phase, epoch, weights, kept, loss, speed):
        seen.append(
            (
                epoch,
                sum(int(np.count_nonzero(kernel)) for kernel in bcdl_jax.baselines.kernels_by_layer(weights).values()),
            )
        )

    work = PlainWork(twin, measures.on_device(dataset.train), ROUNDS, lenet300.EXPERIMENT.network.chain, show)
    assert work.round_limits(3) == [(0, 2), (2, 4), (4, 12)]
    assert work.round_limits(1) == [(0, 12)]
    work = dataclasses.replace(work, recipe=dataclasses.replace(ROUNDS, epochs=10, last_round=0.1))
    assert work.round_limits(4) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    for epochs, rounds, starts in ((60, 3, [0, 10, 20]), (14, 2, [0, 3]), (90, 3, [0, 15, 30])):
        work = dataclasses.replace(work, recipe=dataclasses.replace(ROUNDS, epochs=epochs))
        assert [start for start, _ in work.round_limits(rounds)] == starts
    work = dataclasses.replace(work, recipe=ROUNDS)
    trained, masks, (places, levels) = plain_methods.soft_weight_sharing(work, params, key)
    assert [epoch for epoch, _ in seen] == list(range(1, 13))
    in_use = [number for _, number in seen]
    left = {name: np.asarray(mask) for name, mask in bcdl_jax.baselines.kernels_by_layer(masks).items()}
    assert in_use[0] == in_use[1] == 266_200  # No weight is zero in the first round.
    assert in_use[1] > in_use[2] == in_use[3] > in_use[4] == in_use[11] >= sum(mask.sum() for mask in left.values()) > 0
    for name, kernel in bcdl_jax.baselines.kernels_by_layer(trained).items():
        np.testing.assert_array_equal(np.asarray(kernel) != 0, left[name])
        assert (places[name][left[name]] >= 0).all()
        assert levels[name].size <= ROUNDS.components


@pytest.mark.slow
def test_rounds_without_epochs_are_left_out(key):
    """One epoch for three rounds runs the last round alone. Its narrow mixture prunes less than the wide ones."""
    dataset = few_digits(64, 64, 128)
    twin = LeNet300(family=None)
    params = twin.init(key, SAMPLE_IMAGES)["params"]
    kept = []
    for recipe in (
        dataclasses.replace(ROUNDS, epochs=1),
        dataclasses.replace(ROUNDS, epochs=1, deviations=ROUNDS.deviations[-1:], prior_weights=(0.0001,)),
    ):
        work = PlainWork(
            twin, measures.on_device(dataset.train), recipe, lenet300.EXPERIMENT.network.chain, lambda *_: None
        )
        _, masks, _ = plain_methods.soft_weight_sharing(work, params, key)
        kept.append(sum(int(np.sum(mask)) for mask in bcdl_jax.baselines.kernels_by_layer(masks).values()))
    assert kept[0] == pytest.approx(kept[1], rel=0.05)  # The order of the examples differs.


def test_deviations_and_prior_weights_must_be_equally_many():
    with pytest.raises(
        ValueError, match="deviations has 2 values and prior_weights 1; each must have one value per round"
    ):
        PlainRecipe(epochs=1, fine_tune_epochs=0, deviations=(0.1, 0.2))
    with pytest.raises(ValueError, match="last_round is 0; it must be more than 0 and at most 1"):
        PlainRecipe(epochs=1, fine_tune_epochs=0, last_round=0)


@pytest.mark.parametrize("module", [lenet300, lenet5, vgg], ids=lambda module: module.__name__)
def test_recipes_have_a_value_for_every_layer(module):
    experiment = module.EXPERIMENT
    dataset = experiment.datasets[0]
    assert set(experiment.recipes) == set(registry.method_names())
    for method, values in (("dc", "kept"), ("dns", "spread")):
        recipe = experiment.recipe(dataset, method=method)
        assert len(getattr(recipe, values)) == len(recipe.levels) == len(experiment.network.chain)
    for method in METHODS:
        assert experiment.recipe(dataset, method=method).pretrain_epochs > 0
        quick = experiment.recipe(dataset, quick=True, method=method)
        assert (quick.pretrain_epochs, quick.epochs) == (1, experiment.quick["epochs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--pretrain-epochs", "0"],
            "--method dc compresses a trained network; give at least 1 epoch, or give --pretrained.",
        ),
        (["--thresholds", "1", "2", "3"], "--thresholds cannot be used with --method dc; leave it out."),
        (["--devices", "2"], "--devices is 2; with --method dc it must be 1"),
    ],
)
def test_options_that_a_plain_method_lacks_are_refused_in_one_sentence(arguments, message, capsys):
    assert lenet300.main(["--method", "dc", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_scoring_reads_files_of_levels(finished):
    _, out, dataset = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: dataset)
        (error,) = scoring.test_errors([out / "compressed_seed2.bcdl"], "mnist_5k", None, None)
    (run,) = json.loads((out / "result.json").read_text())["runs"]
    assert error == pytest.approx(run["test_error"]["reduced"], abs=1e-4)
