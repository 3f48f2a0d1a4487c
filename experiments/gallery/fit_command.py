"""Prunes a trained gallery network with ``bcdl_jax.train.fit``: ``python -m experiments.gallery_fit NAME``."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.gallery.arguments import check_positive, chosen_network, make_parser
from experiments.gallery.entry import Examples, GalleryNetwork, Splits
from experiments.runtime import caches
from experiments.runtime.command import command_line, reporting_errors

# Importing JAX takes seconds. Functions import the modules that use JAX, so that --help and errors in the arguments appear at once.
if TYPE_CHECKING:
    import bcdl_jax

# The target of observations that do not count.
_PADDING = -1


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    check_positive("--steps", args.steps)
    run(chosen_network(args), args, command_line("gallery_fit", arguments))
    return 0


def run(network: GalleryNetwork, args: argparse.Namespace, command: str) -> None:
    """Converts, trains, prunes, shrinks and measures the network, and writes its files."""
    import jax

    import bcdl_jax
    from experiments.gallery import store
    from experiments.io import files
    from experiments.runtime import machine

    start = time.perf_counter()
    name = f"{network.name}_seed{args.seed}"
    result, weights = f"{name}.json", f"{name}.bcdl"
    out = Path(args.out or f"runs/gallery_fit/{network.name}")
    checkpoints = out / f"checkpoints_seed{args.seed}"
    if not (args.resume and checkpoints.is_dir()):
        files.prepare_out(str(out), args.overwrite, [result, weights, f"{checkpoints.name}/*"])
    apply, variables = store.load_trained(network)
    splits = network.load(args.data_dir)
    inputs = jax.tree.map(jax.numpy.asarray, splits.train.inputs[:2])
    with caches.compilation_cache(True):
        model = bcdl_jax.variational(apply, variables, inputs)
        print(model.plan, flush=True)
        config = bcdl_jax.train.FitConfig(batch_size=network.recipe.batch_size)
        if args.steps is not None:
            config = dataclasses.replace(
                config,
                steps=args.steps,
                rounds=2,
                round_steps=max(1, args.steps // 4),
                fine_tune_steps=max(1, args.steps // 3),
            )
        fitted = bcdl_jax.train.fit(
            model,
            _loss(network),
            _training_data(network, splits.train, args.seed),
            _pair(splits.validation),
            key=jax.random.key(args.seed),
            config=config,
            checkpoints=checkpoints,
        )
        pruned = model.mean_params(fitted.params)
        small_apply, small, report = bcdl_jax.shrink(apply, pruned, inputs)
        content = _measures(network, splits, apply, variables, small_apply, small) | {
            "weights gone": 1 - _count(small) / _count(variables),
            "multiply-adds": report.multiply_adds,
            "validation losses": fitted.losses,
            "kept weights": fitted.kept_weights,
        }
    content |= {
        "network": network.name,
        "seed": args.seed,
        "config": dataclasses.asdict(config),
        "remark": splits.remark,
        "command": command,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine.machine(),
        "versions": machine.versions(*network.packages),
    }
    bcdl_jax.save(out / weights, small, names=True)
    files.write_json(out / result, content)
    shutil.rmtree(checkpoints)
    for part in ("validation", "test"):
        before, after = content[part]
        print(f"{part}: {content['measure']} {before:.4g} -> {after:.4g}")
    print(f"{content['weights gone']:.0%} of the weights are gone; files in {out}")


def _loss(network: GalleryNetwork) -> bcdl_jax.train.Loss:
    from bcdl_jax import train

    losses: dict[str, train.Loss] = {
        "softmax": train.SoftmaxLoss(),
        "token_softmax": train.SoftmaxLoss(ignore=_PADDING),
        "squared_error": train.GaussianLoss(),
    }
    return losses[network.loss]


def _pair(examples: Examples) -> tuple[Any, Any]:
    """The inputs and the targets, with padding in place of targets that do not count."""
    import numpy as np

    targets = np.asarray(examples.targets)
    return examples.inputs, targets if examples.mask is None else np.where(examples.mask, targets, _PADDING)


def _training_data(network: GalleryNetwork, examples: Examples, seed: int) -> Any:
    """The arrays, or for a recipe that changes its images at random, a function from the number of an epoch to its batches."""
    recipe = network.recipe
    if not (recipe.mirror or recipe.shift):
        return _pair(examples)
    return _changing_batches(network, *_pair(examples), seed)


def _changing_batches(
    network: GalleryNetwork, inputs: Any, targets: Any, seed: int
) -> Callable[[int], Iterator[tuple[Any, Any]]]:
    import jax
    import numpy as np

    from experiments.pipeline.augmentation import augmented

    recipe, size = network.recipe, network.recipe.batch_size
    change = jax.jit(lambda images, key: augmented(images, key, mirror=recipe.mirror, shift=recipe.shift))

    def epoch(number: int) -> Iterator[tuple[Any, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), number)
        order = np.random.default_rng([seed, number]).permutation(len(inputs))
        for step in range(len(inputs) // size):
            rows = order[step * size : (step + 1) * size]
            yield change(inputs[rows], jax.random.fold_in(key, step)), targets[rows]

    return epoch


def _measures(
    network: GalleryNetwork, splits: Splits, apply: Any, variables: Any, small_apply: Any, small: Any
) -> dict[str, Any]:
    """The measures before and after, on validation and test data. The test examples are read here, once."""
    from experiments.gallery.losses import LOSSES

    loss = LOSSES[network.loss]
    before, after = loss.measure_of(apply), loss.measure_of(small_apply)
    content: dict[str, Any] = {"measure": f"{loss.measure} in {network.unit}" if network.unit else loss.measure}
    for part in ("validation", "test"):
        examples = getattr(splits, part)
        content[part] = before(variables, examples), after(small, examples)
    return content


def _count(variables: Any) -> int:
    import jax
    import jax.numpy as jnp

    return sum(leaf.size for leaf in jax.tree.leaves(variables) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "gallery_fit",
        "Makes a trained network of the gallery variational, trains and prunes it with bcdl_jax.train.fit, and measures it.",
        "runs/gallery_fit",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    parser.add_argument(
        "--steps",
        type=int,
        help="number of training steps before pruning, for a short run (default: the recipe of FitConfig)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    return parser
