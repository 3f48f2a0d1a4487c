"""The form of docstrings: entries of their sections start with a noun phrase, except that an error is described by a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("bcdl_jax", "experiments") for path in sorted((ROOT / package).rglob("*.py"))]
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
# Words that begin no noun phrase.
FORBIDDEN = {"Of", "By", "As", "On", "In", "From", "Likewise", "What", "How", "Whether", "Those", "That", "For", "If"}


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            yield text


def entries(text: str) -> Iterator[tuple[str, str]]:
    """The section and the first words of each entry of the sections."""
    section, first = None, False
    for line in text.splitlines():
        if (heading := re.fullmatch(r"(\w+):", line)) and heading[1] in SECTIONS:
            section, first = heading[1], True
        elif line and not line.startswith(" "):
            section = None
        elif section in ("Returns", "Yields") and first:
            yield section, line.strip()
            first = False
        elif section in ("Args", "Attributes", "Raises") and (entry := re.match(r"  ([\w*][\w*, ]*): (.*)", line)):
            yield section, entry[2]


def is_allowed(section: str, entry: str) -> bool:
    """Whether an entry begins as entries of its section do. The sentence of an error may begin with an argument."""
    beginning = r"[A-Z`(]" if section == "Raises" else r"[A-Z]"
    return re.match(beginning, entry) is not None and entry.split()[0] not in FORBIDDEN


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_entries_start_with_a_noun_phrase(path):
    found = [entry for text in docstrings(path) for entry in entries(text)]
    assert [entry for entry in found if not is_allowed(*entry)] == []


def test_entries_are_found():
    text = (
        "One line.\n\nArgs:\n  first: The first.\n  second, third: Others,\n    of two lines.\n\nReturns:\n  The sum."
    )
    assert list(entries(text)) == [("Args", "The first."), ("Args", "Others,"), ("Returns", "The sum.")]


@pytest.mark.parametrize("entry", ['"cpu" or "gpu".', "``f(x)``, a scalar.", "likewise.", "What is kept."])
def test_an_entry_without_a_noun_phrase_is_refused(entry):
    assert not is_allowed("Args", entry)
