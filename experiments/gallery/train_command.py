"""Trains a gallery network: ``python -m experiments.gallery_train NAME``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from experiments.gallery.arguments import check_positive, chosen_network, make_parser
from experiments.gallery.entry import GalleryNetwork, PlainRecipe
from experiments.runtime import caches
from experiments.runtime.command import command_line, reporting_errors

# Importing JAX takes seconds. Functions import the modules that use JAX, so that --help and errors in the arguments appear at once.
if TYPE_CHECKING:
    from experiments.gallery.entry import Splits
    from experiments.gallery.training import Training


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    check_positive("--epochs", args.epochs)
    run(chosen_network(args), args, command_line("gallery_train", arguments))
    return 0


def run(network: GalleryNetwork, args: argparse.Namespace, command: str) -> None:
    """Trains the network, measures it and writes its files."""
    import bcdl_jax
    from experiments.gallery import store
    from experiments.gallery.training import Training
    from experiments.io import checkpoints, files, logs

    start = time.perf_counter()
    recipe = network.recipe if args.epochs is None else dataclasses.replace(network.recipe, epochs=args.epochs)
    out = args.out or f"runs/gallery/{network.name}"
    splits = network.load(args.data_dir)
    _print_plan(network, recipe, splits)
    weights, result = store.weights_name(network), store.result_name(network)
    directory, saved = checkpoints.begin(
        out,
        _settings(network, recipe, splits),
        [weights, result, *logs.WRITTEN],
        logs.METRICS,
        every=1,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    with caches.compilation_cache(True), logs.Logs(directory) as log:
        training = Training(network, recipe, splits)
        variables = training.run(saved, log)
        content = _result(network, recipe, splits, training, variables)
    content |= {"command": command, "seconds": round(saved.earlier_seconds + time.perf_counter() - start, 1)}
    bcdl_jax.save(directory / weights, variables, names=True)
    files.write_json(directory / result, content)
    saved.remove()
    print(f"{network.name}: {content['measure']}: validation {content['validation']}, test {content['test']}")
    if args.epochs is None:
        store.keep(directory, (weights, result))
        directory = store.TRAINED
    print(f"{content['seconds']:.0f} s; {weights} and {result} are in {directory}")


def _print_plan(network: GalleryNetwork, recipe: PlainRecipe, splits: Splits) -> None:
    if splits.remark:
        print(splits.remark)
    sizes = ", ".join(f"{size:,} {part}" for part, size in splits.sizes().items())
    print(f"{network.title}, {network.data}: {sizes} examples; {recipe.epochs} epochs", flush=True)


def _settings(network: GalleryNetwork, recipe: PlainRecipe, splits: Splits) -> dict[str, Any]:
    import jax

    from experiments.io import run_settings
    from experiments.runtime import machine

    content = run_settings.checksum([splits.train, splits.validation, splits.test])
    devices = [device.device_kind for device in jax.devices()]
    return {
        "network": network.name,
        **dataclasses.asdict(recipe),
        "content of the data": content,
        "devices": f"{len(devices)} x {', '.join(sorted(set(devices)))}",
        **machine.package_versions(),
    }


def _result(
    network: GalleryNetwork, recipe: PlainRecipe, splits: Splits, training: Training, variables: Any
) -> dict[str, Any]:
    """The content of the result file. The test examples are read here, once."""
    import jax

    from experiments.gallery.losses import LOSSES
    from experiments.runtime import machine

    measure = LOSSES[network.loss].measure
    return {
        "network": network.name,
        "title": network.title,
        "data": network.data,
        "examples": splits.sizes(),
        "measure": f"{measure} in {network.unit}" if network.unit else measure,
        "validation": round(training.measure(variables, splits.validation), 5),
        "test": round(training.measure(variables, splits.test), 5),
        "numbers": sum(leaf.size for leaf in jax.tree.leaves(variables)),
        "recipe": dataclasses.asdict(recipe),
        "remark": splits.remark,
        "machine": machine.machine(),
        "versions": machine.versions(*network.packages),
    }


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "gallery_train",
        "Trains a network of the gallery without the library's layers, and writes its weights and its errors.",
        "runs/gallery",
    )
    parser.add_argument(
        "--epochs", type=int, help="number of epochs (default: the recipe's; only then the trained network is kept)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    return parser
