"""Test errors of compressed files: each is decoded, shrunk, and run on the test images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax
from experiments.io import data
from experiments.registry import NETWORKS, Network, title_at_width
from experiments.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]


def test_errors(paths: Sequence[str | Path], dataset: str, data_dir: str | None, width: float | None) -> list[float]:
    """Decodes files, shrinks the networks, and runs them on the test images.

    Args:
      paths: The files.
      dataset: The name of the data set.
      data_dir: The directory of its data, or None for the default.
      width: The width of a VGG; None for files of the other networks.

    Returns:
      The errors in percent.

    Raises:
      UserError: A file or the data set cannot be read, or the embedded digits would stand in for full MNIST.
    """
    # Networks that were trained on full MNIST have seen the embedded digits.
    loaded = data.load(dataset, data_dir, replaceable=False)
    networks = {
        title_at_width(network.title, width): network
        for network in NETWORKS.values()
        if network.has_widths == (width is not None)
    }
    templates = {title: _template(network, width or 1) for title, network in networks.items()}
    errors = []
    for path in paths:
        title, params = _read(path, templates, width)
        test = loaded.padded_to(networks[title].image_shape).test
        errors.append(_error(networks[title].build(None, width or 1), params, test))
    return errors


def in_fresh_process(
    paths: Sequence[Path], dataset: str, data_dir: str | None, width: float | None = None
) -> list[float]:
    """``test_errors`` from another process, which has nothing but the files."""
    options = ["--dataset", dataset, *(["--data-dir", str(Path(data_dir).absolute())] if data_dir else [])]
    options += [] if width is None else ["--vgg", str(width)]
    names = [str(path.absolute()) for path in paths]
    command = [sys.executable, "-m", "experiments.score", "--json", *options, "--", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    if done.returncode:
        raise UserError(f"The compressed files could not be scored: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _template(network: Network, width: float) -> Any:
    """The shapes of the variational network's params."""
    model = network.build(bcdl_jax.GroupNormalJeffreys(), width)
    sample = np.zeros((1, *network.image_shape), np.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), sample)["params"]


def _read(path: str | Path, templates: Mapping[str, Any], width: float | None) -> tuple[str, Any]:
    """The title of the network whose file this is, and the decoded params."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    refused = []
    for title, template in templates.items():
        try:
            return title, bcdl_jax.codec.decode(content, template)
        except bcdl_jax.codec.CompressedFileError as error:
            refused.append(f"not one of {title} ({error})")
    try:
        bcdl_jax.codec.summarize(content)
    except bcdl_jax.codec.CompressedFileError as error:
        raise UserError(f"{path} cannot be decoded: {error}") from error
    more = "; those of VGG need --vgg WIDTH" if width is None else ""
    raise UserError(f"{path} is not a file of a known network: {', '.join(refused)}{more}.")


def _error(twin: Any, params: Any, test: data.Split) -> float:
    """The error of the shrunk plain twin, in percent."""
    images = jnp.asarray(test.images)
    small_apply, small, _ = bcdl_jax.shrink(
        lambda weights, images: twin.apply({"params": weights}, images), bcdl_jax.mean_weights(params), images[:2]
    )
    predict = jax.jit(lambda weights, images: jnp.argmax(small_apply(weights, images), axis=-1))
    found = np.concatenate([predict(small, images[rows]) for rows in data.chunks(len(images))])
    return float(100 * np.mean(found != test.labels))
