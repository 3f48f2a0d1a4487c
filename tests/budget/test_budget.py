import collections
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax import budget, train
from bcdl_jax.__main__ import main
from bcdl_jax.budget.candidates import Pruner, count_weights, estimated_bytes
from bcdl_jax.budget.errors import ExampleErrors, increase_from


def network(params, x):
    hidden = jax.nn.relu(x @ params["first"] + params["bias"])
    return (hidden * params["gain"]) @ params["last"]


@pytest.fixture(scope="module")
def trained(key):
    """(model, trained params, validation): a classifier that reads four of twelve inputs, with a plain array of 30 gains."""
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (2600, 12))
    first = jnp.zeros((12, 30)).at[:4].set(jax.random.normal(keys[1], (4, 30)))
    params = {
        "first": first + 0.05 * jax.random.normal(keys[2], first.shape),
        "bias": jnp.zeros(30),
        "gain": 1 + 0.3 * jax.random.normal(keys[3], (30,)),
        "last": 0.5 * jax.random.normal(keys[4], (30, 3)),
    }
    labels = jnp.argmax(network(params | {"first": first}, x), axis=-1)
    model = bcdl_jax.variational(network, params, x[:2], rules={"gain": None})
    config = train.FitConfig(steps=400, rounds=0, fine_tune_steps=0, batch_size=64)
    data, validation = (x[:1000], labels[:1000]), (x[1000:], labels[1000:])
    fitted = train.fit(model, train.SoftmaxLoss(), data, validation, config=config, progress=False)
    return model, fitted.params, validation


def compress(trained, **options):
    model, params, validation = trained
    return bcdl_jax.compress(model, params, validation, bcdl_jax.wrong_class, progress=False, **options)


@pytest.fixture(scope="module")
def small(trained):
    return compress(trained, max_increase=1.0)


def test_the_increase_stays_within_the_budget(trained, small):
    model, params, (inputs, labels) = trained
    report = small.report
    assert report.chosen.increase.increase <= 1.0
    assert report.chosen.is_coded
    # Thirty-two bits for each weight before, and a fraction of the weights after.
    assert report.bytes[0] == 4 * (12 * 30 + 30 + 30 + 90)
    assert report.bytes[1] < 0.12 * report.bytes[0]
    assert report.multiply_adds[1] < 0.5 * report.multiply_adds[0]
    assert report.kept_weights[0] < 0.5 * report.kept_weights[1] == 0.5 * 450
    assert report.plain_bits in (8, 10)
    # The errors are those of both parts together, counted anew.
    wrong = lambda params: 100 * (np.argmax(model.apply(params, inputs), -1) != labels)  # noqa: E731
    parts = report.error[1], report.held_out[1]
    assert [part.examples for part in parts] == [1200, 400]
    for place, params_of in enumerate((params, small.full_params)):
        means = [report.error[0], report.held_out[0]] if not place else [part.error for part in parts]
        np.testing.assert_allclose(np.average(means, weights=[1200, 400]), wrong(params_of).mean(), rtol=1e-5)
    np.testing.assert_allclose(small(inputs[:9]), model.apply(small.full_params, inputs[:9]), rtol=1e-4, atol=1e-4)
    text = str(report)
    assert "budget: max_increase=1" in text
    assert f"other arrays: 120 bytes, rounded to {report.plain_bits} bits" in text


def test_a_larger_budget_gives_a_smaller_network(trained, small):
    assert compress(trained, max_increase=8.0).report.bytes[1] < small.report.bytes[1]
    share = 1.0 / small.report.error[0]
    assert compress(trained, max_relative_increase=share).report.bytes == small.report.bytes


def test_a_target_of_bytes_is_met_by_the_file(trained, small, tmp_path):
    target = 300
    found = compress(trained, target_bytes=target)
    assert found.save(tmp_path / "small.bcdl", program=False) <= target
    assert found.report.bytes[1] <= target
    assert found.report.error[1].increase < 25
    front = list(budget.pareto_front(found.report.points))
    assert [point.bytes for point in front] == sorted(point.bytes for point in front)
    increases = [point.increase.increase for point in front]
    assert increases == sorted(increases, reverse=True)
    with pytest.raises(
        ValueError, match=r"No network keeps to target_bytes=20\. The smallest one that was tried takes"
    ):
        compress(trained, target_bytes=20)


def test_a_target_of_work_is_met_by_the_small_network(trained):
    found = compress(trained, target_multiply_adds=200)
    assert 120 < found.report.multiply_adds[1] <= 200


def test_the_file_runs_without_the_code_of_the_network(trained, small, tmp_path):
    inputs = np.asarray(trained[2][0][:5])
    path = tmp_path / "network.bcdn"
    size = small.save(path)
    assert size == path.stat().st_size > small.report.bytes[1]
    np.save(tmp_path / "inputs.npy", inputs)
    code = (
        "import sys, numpy as np, bcdl_jax; "
        "np.save(sys.argv[3], bcdl_jax.load_network(sys.argv[1])(np.load(sys.argv[2])))"
    )
    outputs = tmp_path / "outputs.npy"
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "inputs.npy", outputs], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(outputs), small(inputs), rtol=1e-5, atol=1e-5)
    data = path.read_bytes()
    for change, message in (
        (data[:-9], "its checksum does not match"),
        (b"x" + data, "This is not a network file: it does not begin with BCDN"),
    ):
        path.write_bytes(change)
        with pytest.raises(bcdl_jax.codec.CompressedFileError, match=message):
            bcdl_jax.load_network(path)


def test_the_command_line_runs_and_inspects_the_file(trained, small, tmp_path, capsys):
    inputs = np.asarray(trained[2][0][:7])
    path, given, found = (str(tmp_path / name) for name in ("network.bcdn", "inputs.npy", "outputs.npy"))
    small.save(path)
    np.save(given, inputs)
    assert main(["run", path, "--input", given, "--output", found]) == 0
    np.testing.assert_allclose(np.load(found), small(inputs), rtol=1e-5, atol=1e-5)
    assert main(["run", path, "--input", given]) == 0
    assert capsys.readouterr().out.startswith("float32 (7, 3)\n[[")
    assert main(["verify", path]) == 0
    assert re.search(r"valid, 3 layers and arrays, a program of [\d,]+ bytes, [\d,]+ bytes\n", capsys.readouterr().out)
    assert main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "first" in out
    assert re.search(r"program: [\d,]+ bytes; whole file: [\d,]+ bytes\n", out)
    np.save(given, inputs[:, :5])
    Path(found).write_text("no array")
    small.save(tmp_path / "params.bcdl", program=False)
    for arguments, message in (
        (["run", path, "--input", given], "does not take inputs of float32 (7, 5)"),
        (["run", path, "--input", found], "is not an array in NumPy's format .npy."),
        (["run", path, "--input", str(tmp_path / "none.npy")], "none.npy cannot be read or written: No such file"),
        (["run", str(tmp_path / "params.bcdl"), "--input", given], "This is not a network file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


class Tags(HTMLParser):
    """Checks that tags are closed in order, and counts them."""

    def __init__(self):
        super().__init__()
        self.open, self.counts = [], collections.Counter()

    def handle_starttag(self, tag, attributes):
        self.counts[tag] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] += 1


def test_the_page_shows_every_entry_and_point(small):
    report = small.report
    page = budget.report_page(report, title="A <small> network")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "A &lt;small&gt; network" in page
    assert "http" not in page
    assert tags.counts["tr"] == 1 + len(report.entries) == 4
    # The curve, and a histogram for each layer.
    assert tags.counts["svg"] == 3
    assert tags.counts["circle"] > 5
    assert f"{report.bytes[1]:,} bytes" in page
    first, gain, last = report.entries
    assert (first.name, first.shape, last.small_shape[1]) == ("first", (12, 30), 3)
    assert (gain.is_layer, gain.is_rounded, gain.bits) == (False, True, report.plain_bits)
    assert first.scores.shape == first.kept.shape == (12,)
    assert first.scores[first.kept].max() < first.scores[~first.kept].min()
    assert report.entries[0].bytes + report.entries[2].bytes < report.bytes[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_page(small, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(budget.report_page(small.report))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    command = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert shown.count("<svg") == 3
    assert "Layers and arrays" in shown


def test_the_shares_of_the_pruner_are_those_of_the_weights(trained):
    _, params, _ = trained
    pruner = Pruner.of(params, None)
    whole, _ = count_weights(params)
    for share in (0.8, 0.5, 0.2):
        kept, _ = count_weights(pruner.pruned(share))
        # One unit of the first layer has 30 weights.
        assert share * whole - 1 <= kept <= share * whole + 31
    assert pruner.pruned(1.0) is params


def test_the_estimate_is_near_the_size_of_the_file(trained):
    _, params, _ = trained
    for share, step in ((1.0, 0.25), (0.5, 1.0)):
        reduced = bcdl_jax.reduce_precision(Pruner.of(params, None).pruned(share), step)
        size = len(bcdl_jax.codec.encode(reduced))
        assert 0.6 * size < estimated_bytes(reduced) < 1.6 * size


def test_plain_arrays_are_rounded_to_powers_of_two(key):
    tree = {
        "a": jax.random.normal(key, (40,)),
        "half": jnp.ones(3, jnp.bfloat16),
        "count": jnp.arange(3),
        "zero": jnp.zeros(2),
    }
    for bits in (4, 8, 16):
        rounded = bcdl_jax.compression.round_plain_arrays(tree, bits)
        peak = float(jnp.abs(tree["a"]).max())
        step = 2.0 ** np.ceil(np.log2(peak / (2 ** (bits - 1) - 1)))
        np.testing.assert_allclose(rounded["a"] / step, np.round(rounded["a"] / step), atol=0)
        assert float(jnp.abs(rounded["a"] - tree["a"]).max()) <= step / 2
        assert float(jnp.abs(rounded["a"] / step).max()) <= 2 ** (bits - 1) - 1
        for name in ("half", "count", "zero"):
            np.testing.assert_array_equal(rounded[name], tree[name])
            assert rounded[name].dtype == tree[name].dtype
    mask = {"mask": jnp.array([0, -jnp.inf]), "large": jnp.array([1, 65400], jnp.float16)}
    jax.tree.map(np.testing.assert_array_equal, bcdl_jax.compression.round_plain_arrays(mask, 8), mask)
    with pytest.raises(ValueError, match="bits is 1; it must be from 2 to 16"):
        bcdl_jax.compression.round_plain_arrays(tree, 1)


def test_increases_have_the_standard_error_of_paired_differences():
    before, after = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 3, 5])
    found = increase_from(before, after)
    assert (found.error, found.increase, found.examples) == (3, 0.5, 4)
    np.testing.assert_allclose(found.standard_error, np.std([0, 1, 0, 1], ddof=1) / 2)
    errors = ExampleErrors(
        lambda params, x: params * x, bcdl_jax.squared_error, jnp.ones((1100, 3)), jnp.zeros((1100, 3))
    )
    np.testing.assert_allclose(errors(jnp.float32(2)), np.full(1100, 4.0))
    scalar = ExampleErrors(lambda params, x: x, lambda outputs, targets: outputs.mean(), jnp.ones((8, 3)), jnp.zeros(8))
    with pytest.raises(ValueError, match=r"error returns an array of shape \(\) for 8 examples; it must return \[8, "):
        scalar({})


def test_rounding_plain_arrays_never_uses_up_the_budget(key):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (120, 6))
    params = {"w": jax.random.normal(keys[1], (6, 3)), "gain": 1 + jax.random.normal(keys[2], (3,))}
    apply = lambda params, x: (x @ params["w"]) * params["gain"]  # noqa: E731
    model = bcdl_jax.variational(apply, params, x[:2], rules={"gain": None})
    labels = jnp.argmax(apply(params, x), -1)
    small = bcdl_jax.compress(model, model.params, (x, labels), bcdl_jax.wrong_class, max_increase=0, progress=False)
    assert small.report.error[1].increase <= 0


def test_errors_of_examples_and_wrong_shapes():
    scores, labels = jnp.array([[1.0, 2], [3, 1]]), jnp.array([1, 1])
    np.testing.assert_array_equal(bcdl_jax.wrong_class(scores, labels), [0, 100])
    np.testing.assert_array_equal(budget.wrong_label(scores - 1.5, jnp.array([[0, 1], [1, 1]])), [[0, 0], [0, 100]])
    np.testing.assert_array_equal(bcdl_jax.squared_error(scores, 1.0 * scores + 2), np.full((2, 2), 4))
    for error, targets, message in (
        (
            bcdl_jax.wrong_class,
            labels[:, None],
            r"wrong_class has outputs of shape \(2, 2\) and targets of shape \(2, 1\)",
        ),
        (budget.wrong_label, labels, r"wrong_label has outputs of shape \(2, 2\) and targets of shape \(2,\)"),
        (
            bcdl_jax.squared_error,
            labels[:, None],
            r"squared_error has outputs of shape \(2, 2\) and targets of shape \(2, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            error(scores, targets)


def test_bad_input_is_refused(trained):
    model, params, (inputs, labels) = trained
    with pytest.raises(ValueError, match="No budget is given; give exactly one of max_increase, max_relative_increase"):
        compress(trained)
    with pytest.raises(ValueError, match="max_increase and target_bytes are given; give exactly one"):
        compress(trained, max_increase=1, target_bytes=3)
    with pytest.raises(ValueError, match="max_increase is -1; it must be a finite number of 0 or more"):
        compress(trained, max_increase=-1)
    with pytest.raises(ValueError, match="held_out is 1; it must be more than 0 and less than 1"):
        compress(trained, max_increase=1, held_out=1)
    for validation, message in (
        (inputs, "validation is a ArrayImpl; it must be a pair"),
        ((inputs, labels[:9]), r"The arrays of validation have \[9, 1600\] examples"),
        ((inputs.at[0].set(jnp.nan), 1.0 * labels), None),
    ):
        if message is None:
            error = lambda outputs, targets: outputs[:, 0] - targets  # noqa: E731
            message = "The error of the given network is not finite"
        else:
            error = bcdl_jax.wrong_class
        with pytest.raises(ValueError, match=message):
            bcdl_jax.compress(model, params, validation, error, max_increase=1)
