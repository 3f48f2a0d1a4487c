"""The form of docstrings: entries of their sections start with a noun phrase."""

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


def entries(text: str) -> Iterator[str]:
    """The first words of each entry of the sections."""
    section = None
    for line in text.splitlines():
        if (heading := re.fullmatch(r"(\w+):", line)) and heading[1] in SECTIONS:
            section = heading[1]
        elif line and not line.startswith(" "):
            section = None
        elif section in ("Args", "Attributes", "Raises") and (entry := re.match(r"  ([\w*][\w*, ]*): (.*)", line)):
            yield entry[2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_entries_start_with_a_noun_phrase(path):
    wrong = [
        entry
        for text in docstrings(path)
        for entry in entries(text)
        if not re.match(r"[A-Z0-9`\"(\[]", entry) or entry.split()[0] in FORBIDDEN
    ]
    assert wrong == []


def test_entries_are_found():
    text = (
        "One line.\n\nArgs:\n  first: The first.\n  second, third: Others,\n    of two lines.\n\nReturns:\n  The sum."
    )
    assert list(entries(text)) == ["The first.", "Others,"]
