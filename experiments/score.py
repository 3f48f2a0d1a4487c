"""Test error of compressed files, decoded and shrunk: ``python -m experiments.score FILE ...``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cli.command_line import at_width
from experiments.io.data import EMBEDDED, NAMES
from experiments.runtime.errors import UserError


def test_errors(paths: Sequence[str | Path], dataset: str, data_dir: str | None, width: float | None) -> list[float]:
    """Decodes files of the LeNets, shrinks them, and runs them on the test images; with ``width`` files of a VGG that is so many times as wide.

    Returns:
      Errors in percent.

    Raises:
      UserError: a file or the data set can't be read; the embedded digits would stand in for full MNIST.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import bcdl_jax
    from experiments.io import data
    from experiments.networks import models

    loaded = data.load(dataset, data_dir)
    if loaded.notice:  # nets trained on full MNIST have seen the embedded digits
        raise UserError(
            f"{loaded.notice.split(':')[0]}, on whose test images the files are scored. Give --data-dir or set TFDS_DATA_DIR; for nets "
            f"trained on the embedded digits, --dataset {data.EMBEDDED}."
        )
    networks: dict[str, Any] = {"LeNet-300-100": models.LeNet300(), "LeNet-5-Caffe": models.LeNet5()}
    shapes = dict.fromkeys(networks, (28, 28, 1))
    if width is not None:
        title = at_width("VGG", width)
        networks = {title: models.vgg(bcdl_jax.GroupNormalJeffreys(), width)}
        shapes = {title: (32, 32, 3)}
    templates = {
        title: jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *shapes[title]), np.uint8))["params"]
        for title, model in networks.items()
    }

    def read(path: str | Path) -> tuple[str, Any]:
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
        raise UserError(f"{path} is not a file of a network that is known here: {', '.join(refused)}{more}.")

    errors = []
    for path in paths:
        title, params = read(path)
        twin = networks[title].clone(family=None)
        test = loaded.padded_to(shapes[title]).test
        images = jnp.asarray(test.images)
        small_apply, small, _ = bcdl_jax.shrink(
            lambda weights, images, twin=twin: twin.apply({"params": weights}, images),
            bcdl_jax.mean_weights(params),
            images[:2],
        )
        predict = jax.jit(lambda weights, images, apply=small_apply: jnp.argmax(apply(weights, images), axis=-1))
        found = np.concatenate([predict(small, images[some]) for some in data.pieces(len(images))])
        errors.append(float(100 * np.mean(found != test.labels)))
    return errors


def in_fresh_process(
    paths: Sequence[Path], dataset: str, data_dir: str | None, width: float | None = None
) -> list[float]:
    """The same from another process, which has nothing but the files."""
    options = ["--dataset", dataset, *(["--data-dir", str(Path(data_dir).absolute())] if data_dir else [])]
    options += [] if width is None else ["--vgg", str(width)]
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
        description="Decodes compressed files, as experiments.lenet300, experiments.lenet5 and experiments.vgg write them, and prints their test errors.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a compressed file")
    parser.add_argument(
        "--dataset", metavar="|".join(NAMES), help="data set to test on (default: mnist, cifar10 with --vgg)"
    )
    parser.add_argument(
        "--data-dir", help="directory of tensorflow-datasets data (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)"
    )
    parser.add_argument(
        "--vgg",
        type=float,
        metavar="WIDTH",
        help="the files are of experiments.vgg, at this --width (otherwise: of a LeNet)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of numbers instead of sentences")
    args = parser.parse_args(arguments)
    if args.dataset is None:
        args.dataset = "mnist" if args.vgg is None else "cifar10"
    try:
        if args.dataset not in NAMES:
            raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(NAMES)}.")
        if args.vgg is not None and not 0 < args.vgg <= 1:
            raise UserError(f"--vgg is {args.vgg}; it must be more than 0 and at most 1.")
        errors = test_errors(args.files, args.dataset, args.data_dir, args.vgg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(errors))
        return 0
    if args.dataset == EMBEDDED:
        print(
            "The embedded digits are training images of full MNIST: an error on them means something only for a net trained on them."
        )
    for path, percent in zip(args.files, errors, strict=True):
        print(f"{path}: {Path(path).stat().st_size:,} bytes, test error {percent:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
