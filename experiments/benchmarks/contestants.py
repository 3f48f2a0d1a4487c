"""The contestants of the inference benchmark: dense, masked and shrunk networks, compiled in every available engine."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax
from experiments.networks.layers import norm_pairs
from experiments.networks.vgg import VGG
from experiments.registry import NETWORKS
from experiments.runtime import backend

SIDES = ("dense", "masked", "shrunk")


@dataclasses.dataclass(frozen=True)
class PrunedCase:
    """A network and the sizes to prune it to, those of a method of [L17 table 1].

    Attributes:
      network: The name of the network in ``NETWORKS``.
      method: The name of the method.
      model: The plain Flax module.
      outputs: The numbers of kept output channels of the convolutions, in order.
      inputs: The numbers of kept inputs of the dense layers, in order.
      batches: The batch sizes to time.
    """

    network: str
    method: str
    model: nn.Module
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    batches: tuple[int, ...]

    @property
    def title(self) -> str:
        """The network and the method."""
        return f"{NETWORKS[self.network].title}, {self.method.upper()}"

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of one image."""
        return NETWORKS[self.network].image_shape


_CASES = (
    PrunedCase("lenet300", "gnj", NETWORKS["lenet300"].build(None, 1), (), (278, 98, 13), (1, 256, 8192)),
    PrunedCase("lenet5", "ghs", NETWORKS["lenet5"].build(None, 1), (5, 10), (76, 16), (1, 256, 8192)),
    # With batch norms, unlike the network of the experiment.
    PrunedCase(
        "vgg",
        "ghs",
        VGG(family=None),
        (51, 62, 125, 128, 228, 129, 38, 13, 9, 6, 5, 6, 6),
        (6, 20),
        (1, 256),
    ),
)
CASES = {case.network: case for case in _CASES}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A network in one engine.

    Attributes:
      side: The form of the network, "dense", "masked" or "shrunk".
      engine: The engine, "XLA", "XLA, for_cpu" or "onnxruntime".
      run: A function that processes one batch.
      bytes: The memory of the program in bytes (arguments, results and temporary arrays); None if the engine does not report it.
    """

    side: str
    engine: str
    run: Callable[[], Any]
    bytes: int | None


def contestants_of(case: PrunedCase, batch: int, seed: int = 0) -> tuple[list[Contestant], tuple[int, int]]:
    """Compiles the three sides of a network in every available engine.

    Args:
      case: The network and its kept sizes.
      batch: The batch size.
      seed: The seed of the weights, the images and the kept units.

    Returns:
      The contestants, and the multiply-adds of the dense and of the shrunk network.
    """
    images = jax.random.randint(jax.random.key(seed), (batch, *case.image), 0, 256).astype(jnp.uint8)
    variables = jax.jit(case.model.init)(jax.random.key(seed + 1), images[:1])
    masks = jax.tree.map(jnp.asarray, masks_of(case, variables, seed))
    small_apply, small, report = bcdl_jax.shrink(
        case.model.apply, jax.tree.map(jnp.multiply, variables, masks), images[:2]
    )

    def masked(arguments: Any, images: jax.Array) -> Any:
        return case.model.apply(jax.tree.map(jnp.multiply, *arguments), images)

    sides: dict[str, tuple[Callable[..., Any], Any]] = {
        "dense": (case.model.apply, variables),
        "masked": (masked, (variables, masks)),
        "shrunk": (small_apply, small),
    }
    on_cpu = backend.on_cpu()
    contestants = []
    for side, (apply, params) in sides.items():
        engines = {"XLA": apply} | ({"XLA, for_cpu": bcdl_jax.for_cpu(apply)} if on_cpu else {})
        for engine, function in engines.items():
            compiled = jax.jit(function).lower(params, images).compile()
            memory: Any = compiled.memory_analysis()
            size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            contestants.append(Contestant(side, engine, functools.partial(_run, compiled, params, images), size))
        if on_cpu and has_onnx():
            contestants.append(Contestant(side, "onnxruntime", _in_onnxruntime(apply, params, images), None))
    return contestants, report.multiply_adds


def masks_of(case: PrunedCase, variables: dict[str, Any], seed: int) -> dict[str, Any]:
    """Random masks with the kept sizes of a case.

    Args:
      case: The network and its kept sizes.
      variables: The variables of the network.
      seed: The seed of the kept units.

    Returns:
      A tree like ``variables`` with 1 for kept entries and 0 for pruned ones.
    """
    generator = np.random.default_rng(seed)
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    params, chain = masks["params"], NETWORKS[case.network].chain
    convolutions = dict(zip(_of_rank(params, chain, 4), case.outputs, strict=True))
    dense = dict(zip(_of_rank(params, chain, 2), case.inputs, strict=True))
    last_channels = _mask_convolutions(params, convolutions, dict(norm_pairs(case.model)), generator)
    _mask_dense_layers(params, dense, last_channels, generator)
    return masks


def has_onnx() -> bool:
    """Whether onnx and onnxruntime are installed."""
    return all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))


def _of_rank(params: Any, chain: tuple[str, ...], rank: int) -> list[str]:
    """The names of the layers whose kernels have this rank: 4 for convolutions, 2 for dense layers."""
    return [name for name in chain if params[name]["kernel"].ndim == rank]


def _mask_convolutions(
    params: Any, outputs: dict[str, int], norms: dict[str, str], generator: np.random.Generator
) -> np.ndarray | None:
    """Masks the output channels of the convolutions and of their norms in place.

    Returns:
      The mask of the last convolution; None without convolutions.
    """
    kept = None
    for name, count in outputs.items():
        layer = params[name]
        kept = _random_mask(layer["kernel"].shape[-1], count, generator)
        layer["kernel"] *= kept
        layer["bias"] *= kept
        if name in norms:
            norm = params[norms[name]]
            norm["scale"] *= kept
            norm["bias"] *= kept
    return kept


def _mask_dense_layers(
    params: Any, inputs: dict[str, int], last_channels: np.ndarray | None, generator: np.random.Generator
) -> None:
    """Masks the inputs of the dense layers in place. The first layer keeps inputs from kept channels only."""
    before, channels = None, last_channels
    for name, count in inputs.items():
        kernel = params[name]["kernel"]
        allowed = None if channels is None else np.tile(channels, kernel.shape[0] // channels.size)
        kept = _random_mask(kernel.shape[0], count, generator, allowed)
        kernel *= kept[:, None]
        if before is not None:
            before["kernel"] *= kept
            before["bias"] *= kept
        before, channels = params[name], None


def _random_mask(
    size: int, count: int, generator: np.random.Generator, allowed: np.ndarray | None = None
) -> np.ndarray:
    """A mask [size] of bool with ``count`` kept entries, which are drawn from the allowed ones."""
    places = np.arange(size) if allowed is None else np.flatnonzero(allowed)
    mask = np.zeros(size, bool)
    mask[generator.choice(places, count, replace=False)] = True
    return mask


def _run(function: Callable[..., Any], params: Any, images: jax.Array) -> None:
    jax.block_until_ready(function(params, images))


def _in_onnxruntime(apply: Callable[..., Any], params: Any, images: jax.Array) -> Callable[[], Any]:
    """The network in onnxruntime. The export multiplies the masks into the weights."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "net.onnx"
        bcdl_jax.export_onnx(path, apply, params, images[:2])
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.asarray(images)}
    return lambda: session.run(None, feed)
