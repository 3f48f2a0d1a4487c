"""Models of the sizes that people use, with random weights, of which a third of the units, channels and heads are zero."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


@dataclasses.dataclass(frozen=True)
class LargeModel:
    """A model of the benchmark.

    Attributes:
      title: Its name and size.
      make: A function of a flag, True for a tiny version. It returns ``apply(variables, inputs)``, variables and inputs.
    """

    title: str
    make: Callable[[bool], tuple[Callable[[Tree, Any], Tree], Tree, Any]]


class Block(nn.Module):
    """A transformer block with the norms first."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, width = x.dtype, x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        y = nn.LayerNorm(dtype=dtype, param_dtype=dtype)(x)
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=dtype, param_dtype=dtype)
        x = x + attention(y, mask=mask)
        y = nn.LayerNorm(dtype=dtype, param_dtype=dtype)(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=dtype, param_dtype=dtype, name="hidden")(y))
        return x + nn.Dense(width, dtype=dtype, param_dtype=dtype, name="outputs")(y)


class VisionTransformer(nn.Module):
    """ViT, with a class token and learned positions."""

    width: int
    depth: int
    heads: int
    patch: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            x = Block(self.heads, causal=False)(x)
        return nn.Dense(1000, name="head")(nn.LayerNorm()(x)[:, 0])


class LanguageModel(nn.Module):
    """BERT without its head, or GPT-2 with its causal mask and the embedding as head."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, param_dtype=self.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width), self.dtype)
        x = embed(tokens) + positions
        for _ in range(self.depth):
            x = Block(self.heads, self.causal)(x)
        x = nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype)(x)
        return embed.attend(x) if self.causal else x[:, 0]


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        conv = functools.partial(nn.Conv, use_bias=False)
        y = nn.relu(norm(name="hidden_norm_1")(conv(self.width, (1, 1), name="hidden_1")(x)))
        y = conv(self.width, (3, 3), (self.stride,) * 2, name="hidden_2")(y)
        y = nn.relu(norm(name="hidden_norm_2")(y))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if y.shape != x.shape:
            x = norm()(conv(4 * self.width, (1, 1), (self.stride,) * 2)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet with bottleneck blocks."""

    stages: tuple[tuple[int, int], ...]  # Width and number of blocks.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), (2, 2), padding=[(3, 3)] * 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1)] * 2)
        for stage, (width, blocks) in enumerate(self.stages):
            for block in range(blocks):
                x = Bottleneck(width, stride=2 if stage and not block else 1)(x)
        return nn.Dense(1000, name="head")(x.mean((1, 2)))


def _vit(tiny: bool) -> Any:
    model = VisionTransformer(48, 2, 3, 8) if tiny else VisionTransformer(768, 12, 12, 16)
    return _with_weights(model, np.ones((2, *((32, 32) if tiny else (224, 224)), 3), np.float32))


def _language_model(tiny: bool, vocabulary: int, causal: bool) -> Any:
    model = LanguageModel(128 if tiny else vocabulary, *((48, 2, 3) if tiny else (768, 12, 12)), causal=causal)
    return _with_weights(model, np.ones((2, 16 if tiny else 128), np.int32))


def _decoder(tiny: bool) -> Any:
    size = (48, 2, 3) if tiny else (2048, 24, 16)
    model = LanguageModel(128 if tiny else 50304, *size, causal=True, dtype=jnp.bfloat16)
    return _with_weights(model, np.ones((2, 16 if tiny else 32), np.int32))


def _resnet(tiny: bool) -> Any:
    model = ResNet(((12, 1), (24, 1)) if tiny else ((64, 3), (128, 4), (256, 6), (512, 3)))
    return _with_weights(model, np.ones((2, *((32, 32) if tiny else (224, 224)), 3), np.float32))


def _with_weights(model: nn.Module, inputs: np.ndarray) -> tuple[Callable[[Tree, Any], Tree], Tree, Any]:
    rng = np.random.default_rng(0)
    structs = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))

    def weights(path: Any, struct: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ends = name.rpartition("/")[2]
        if ends in ("scale", "var"):
            value = np.ones(struct.shape, np.float32)
        else:
            # Numbers repeat, so that large arrays are made quickly.
            value = np.resize(0.02 * rng.normal(size=min(struct.size, 1 << 20)).astype(np.float32), struct.shape)
        if "hidden" in name and ends in ("kernel", "bias", "mean"):
            value[..., : value.shape[-1] // 3] = 0
        if any(part in name for part in ("/query/", "/key/", "/value/")):
            value[..., : value.shape[-2] // 3, :] = 0  # Heads.
        return jnp.asarray(value, struct.dtype)

    return model.apply, jax.tree_util.tree_map_with_path(weights, structs), inputs


LARGE_MODELS = {
    "vit": LargeModel("ViT-base, 224 x 224 pixels", _vit),
    "bert": LargeModel("BERT-base, 128 tokens", functools.partial(_language_model, vocabulary=30522, causal=False)),
    "gpt2": LargeModel("GPT-2 small, 128 tokens", functools.partial(_language_model, vocabulary=50257, causal=True)),
    "resnet": LargeModel("ResNet-50, 224 x 224 pixels", _resnet),
    "decoder": LargeModel("decoder of 1.3 billion weights in bfloat16, 32 tokens", _decoder),
}
