import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.__main__ import main
from bcdl_jax.command import read_params

CODE = """
import jax

def apply(params, numbers, shifts):
    hidden = jax.nn.relu(numbers @ params["encoder"]["kernel"] + shifts)
    return hidden @ params["head"]["kernel"]

LIST = []
"""


@pytest.fixture
def files(key, tmp_path, monkeypatch):
    """A module, params and data of a network with two inputs, in an empty directory that is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    keys = jax.random.split(key, 4)
    numbers, shifts = jax.random.normal(keys[0], (900, 6)), 0.1 * jax.random.normal(keys[1], (900, 1))
    first = jnp.zeros((6, 10)).at[:2].set(jax.random.normal(keys[2], (2, 10)))
    last = jax.random.normal(keys[3], (10, 3))
    labels = jnp.argmax(jax.nn.relu(numbers @ first + shifts) @ last, -1)
    (tmp_path / "compress_command_network.py").write_text(CODE)
    noise = 0.05 * jax.random.normal(keys[1], first.shape)
    np.savez(tmp_path / "params.npz", **{"encoder/kernel": first + noise, "head/kernel": last})
    rows = {"data": slice(0, 700), "test": slice(700, 900)}
    for name, part in rows.items():
        np.savez(tmp_path / f"{name}.npz", inputs_0=numbers[part], inputs_1=shifts[part], targets=labels[part])
    return tmp_path


def command(*changes, **options):
    defaults = {"apply": "compress_command_network:apply", "params": "params.npz", "data": "data.npz", "out": "out"}
    given = defaults | {"max_increase": "3", "steps": "120", "test": "test.npz"} | options
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return ["compress", *(word for pair in pairs for word in pair), *changes]


@pytest.mark.slow
def test_a_network_is_compressed_from_files(files, capsys):
    assert main(command()) == 0
    out = capsys.readouterr().out
    assert "encoder/kernel  6 x 10" in out
    assert "budget: max_increase=3" in out
    assert "test error: " in out
    assert sorted(path.name for path in (files / "out").iterdir()) == [
        "network.bcdn",
        "params.bcdl",
        "report.html",
        "report.txt",
    ]
    assert (files / "out" / "report.txt").read_text() in out
    with np.load("test.npz") as test:
        outputs = bcdl_jax.load_network("out/network.bcdn")(test["inputs_0"], test["inputs_1"])
        wrong = 100 * np.mean(np.argmax(outputs, -1) != test["targets"])
    assert f"{wrong:.4g} after" in out
    assert main(command()) == 2
    assert (
        "--out out holds network.bcdn, params.bcdl, report.html, report.txt; give another directory"
        in capsys.readouterr().err
    )


def test_params_are_read_as_a_tree(files):
    safetensors = pytest.importorskip("safetensors.numpy")
    tree = read_params("params.npz")
    assert jax.tree.map(np.shape, tree) == {"encoder": {"kernel": (6, 10)}, "head": {"kernel": (10, 3)}}
    safetensors.save_file(
        {"encoder.kernel": tree["encoder"]["kernel"], "head.kernel": tree["head"]["kernel"]}, "params.safetensors"
    )
    jax.tree.map(np.testing.assert_array_equal, read_params("params.safetensors"), tree)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apply": "compress_command_network"}, "--apply is compress_command_network; it must be MODULE:FUNCTION"),
        ({"apply": "no_such_module:apply"}, "but no_such_module cannot be imported: No module named 'no_such_module'."),
        ({"apply": "compress_command_network:LIST"}, "but compress_command_network has no function LIST."),
        ({"params": "none.npz"}, "none.npz cannot be read or written: No such file"),
        ({"params": "compress_command_network.py"}, "it must be a file of the type .npz or .safetensors."),
        ({"data": "params.npz"}, '--data params.npz holds encoder/kernel, head/kernel; it must hold "inputs"'),
        ({"loss": "gaussian"}, "The network or --error fails on --data: squared_error has outputs of shape (2, 3)"),
        ({"max_increase": "-1"}, "max_increase is -1"),
        ({"test": "data_of_one_input.npz"}, "The network or --error fails on --test: "),
    ],
)
def test_wrong_arguments_are_named_in_one_sentence(files, options, message, capsys):
    np.savez(files / "data_of_one_input.npz", inputs=np.ones((9, 6)), targets=np.zeros(9, int))
    given = {"steps": "2"} | options
    assert main(command(**given)) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert not (files / "out" / "network.bcdn").exists()


def test_damaged_files_are_named(files, capsys):
    (files / "bad.npz").write_bytes(b"no archive")
    np.savez(files / "short.npz", inputs=np.zeros((5, 2)), targets=np.zeros(4))
    for name, message in (
        ("bad.npz", "--data bad.npz is not a file of numpy.savez."),
        ("short.npz", "have different numbers of examples: 5 in inputs, 4 in targets."),
    ):
        assert main(command(data=name)) == 2
        assert message in capsys.readouterr().err
