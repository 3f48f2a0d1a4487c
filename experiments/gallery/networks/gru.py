"""A recurrent classifier of words: an embedding of the characters, a GRU, and a dense layer on its last state."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LENGTH, CHARACTERS, LANGUAGES = 16, 64, 10


class WordClassifier(nn.Module):
    """A GRU over the characters of a word.

    Attributes:
      classes: The number of classes.
      characters: The number of characters. Number 0 stands for no character.
      embedding: The number of features of a character.
      width: The number of features of the GRU.
    """

    classes: int = LANGUAGES
    characters: int = CHARACTERS
    embedding: int = 32
    width: int = 256

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        """The class scores of words [examples, length] of int32. The characters of a word are followed by zeros."""
        x = nn.Embed(self.characters, self.embedding)(words)
        lengths = jnp.sum(words > 0, axis=1)
        last, _ = nn.RNN(nn.GRUCell(self.width), return_carry=True)(x, seq_lengths=lengths)
        return nn.Dense(self.classes)(last)


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(variables, words)``, and new variables."""
    net = WordClassifier()
    return net.apply, net.init(key, jnp.ones((1, LENGTH), jnp.int32))
