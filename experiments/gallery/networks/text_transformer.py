"""A causal transformer that predicts the next character of a text. The embedding of the characters is its last layer, too."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LENGTH, CHARACTERS = 128, 72


class Block(nn.Module):
    """Causal attention and a hidden layer, each behind a layer norm and beside a shortcut.

    Attributes:
      width: The number of features.
      heads: The number of heads.
    """

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(normed, normed, mask=mask)
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden)


class TextTransformer(nn.Module):
    """Embeddings, blocks, and scores of the next character.

    Attributes:
      characters: The number of characters. Number 0 stands for no character.
      length: The largest number of characters of a text.
      width: The number of features.
      heads: The number of heads.
      depth: The number of blocks.
    """

    characters: int = CHARACTERS
    length: int = LENGTH
    width: int = 64
    heads: int = 4
    depth: int = 3

    @nn.compact
    def __call__(self, texts: jax.Array) -> jax.Array:
        """The scores of the next characters, [examples, length, characters], for texts [examples, length] of int32."""
        embedding = nn.Embed(self.characters, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = embedding(texts) + positions[: texts.shape[1]]
        mask = nn.make_causal_mask(texts)
        for _ in range(self.depth):
            x = Block(self.width, self.heads)(x, mask)
        return embedding.attend(nn.LayerNorm()(x))


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(variables, texts)``, and new variables."""
    net = TextTransformer()
    return net.apply, net.init(key, jnp.ones((1, LENGTH), jnp.int32))
