"""Test error of compressed files, decoded and shrunk: ``python -m experiments.score FILE ...``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.data import NAMES
from experiments.errors import UserError


def test_errors(paths: Sequence[str | Path], dataset: str, data_dir: str | None) -> list[float]:
    """Decodes files of the LeNets, shrinks them, and runs them on the test images.

    Returns:
      Errors in percent.

    Raises:
      UserError: a file or the data set can't be read; the embedded digits would stand in for full MNIST.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    import bcdl_jax
    from experiments import data, models

    loaded = data.load(dataset, data_dir)
    if loaded.notice:  # nets trained on full MNIST have seen the embedded digits
        raise UserError(
            f"{loaded.notice.split(':')[0]}, on whose test images the files are scored. Give --data-dir or set TFDS_DATA_DIR; for nets "
            f"trained on the embedded digits, --dataset {data.EMBEDDED}."
        )
    images, labels = jnp.asarray(loaded.test.images), jnp.asarray(loaded.test.labels)
    networks = {"LeNet-300-100": models.LeNet300(), "LeNet-5-Caffe": models.LeNet5()}
    templates = {
        title: jax.eval_shape(model.init, jax.random.key(0), models.SAMPLE_IMAGES)["params"]
        for title, model in networks.items()
    }

    def read(path: str | Path) -> tuple[nn.Module, Any]:
        refused = []
        for title, template in templates.items():
            try:
                return networks[title], bcdl_jax.load(path, like=template)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}.") from error
            except bcdl_jax.CompressedFileError as error:
                refused.append(f"not one of {title} ({error})")
        raise UserError(f"{path} is not a file of a network that is known here: {', '.join(refused)}.")

    errors = []
    for path in paths:
        model, params = read(path)
        twin: Any = model.clone(family=None)  # type: ignore[call-arg]
        small_apply, small, _ = bcdl_jax.shrink(
            lambda weights, images, twin=twin: twin.apply({"params": weights}, images),
            bcdl_jax.mean_weights(params),
            images[:2],
        )
        wrong = jnp.argmax(jax.jit(small_apply)(small, images), axis=-1) != labels
        errors.append(float(100 * jnp.mean(wrong)))
    return errors


def in_fresh_process(paths: Sequence[Path], dataset: str, data_dir: str | None) -> list[float]:
    """The same from another process, which has nothing but the files."""
    options = ["--dataset", dataset, *(["--data-dir", str(Path(data_dir).absolute())] if data_dir else [])]
    names = [str(path.absolute()) for path in paths]
    command = [sys.executable, "-m", "experiments.score", "--json", *options, "--", *names]
    here = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    if done.returncode:
        raise UserError(f"The compressed files could not be scored: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.score",
        description="Decodes compressed files, as experiments.lenet300 and experiments.lenet5 write them, and prints their test errors.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a compressed file")
    parser.add_argument(
        "--dataset", default="mnist", metavar="|".join(NAMES), help="data set to test on (default: mnist)"
    )
    parser.add_argument(
        "--data-dir", help="directory of tensorflow-datasets data (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of numbers instead of sentences")
    args = parser.parse_args(arguments)
    try:
        if args.dataset not in NAMES:
            raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(NAMES)}.")
        errors = test_errors(args.files, args.dataset, args.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(errors))
        return 0
    for path, percent in zip(args.files, errors, strict=True):
        print(f"{path}: {Path(path).stat().st_size:,} bytes, test error {percent:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
