"""Words of ten languages, from the lists of wordfreq: the most frequent ones of each language that no other list has."""

from __future__ import annotations

import collections

import numpy as np

from experiments.gallery.data.packages import random_rows, splits_of
from experiments.gallery.entry import Splits
from experiments.gallery.networks.gru import LENGTH

LANGUAGES = ("de", "en", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv")
_SHORTEST, _PER_LANGUAGE, _READ = 3, 8_000, 20_000


def words(_: str | None = None) -> Splits:
    """Words as characters [n, 16] of int32, followed by zeros, and the numbers of their languages [n]."""
    from wordfreq import top_n_list

    lists = [[word for word in top_n_list(language, _READ) if _is_usual(word)] for language in LANGUAGES]
    counts = collections.Counter(word for chosen in lists for word in chosen)
    own = [[word for word in chosen if counts[word] == 1][:_PER_LANGUAGE] for chosen in lists]
    alphabet = sorted({character for chosen in own for word in chosen for character in word})
    numbers = {character: number for number, character in enumerate(alphabet, 1)}
    inputs = np.zeros((sum(map(len, own)), LENGTH), np.int32)
    for row, word in enumerate(word for chosen in own for word in chosen):
        inputs[row, : len(word)] = [numbers[character] for character in word]
    labels = np.repeat(np.arange(len(LANGUAGES), dtype=np.int32), [len(chosen) for chosen in own])
    return splits_of((inputs, labels), random_rows(len(inputs)))


def _is_usual(word: str) -> bool:
    return word.isalpha() and _SHORTEST <= len(word) <= LENGTH
