"""The README and the guides are run as they stand, and show every public name."""

from __future__ import annotations

import ast
import contextlib
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import bcdl_jax

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [*sorted((ROOT / "bcdl_jax").glob("**/README.md")), ROOT / "bcdl_jax" / "COMPRESS.md"]
# The guides whose code takes more than some seconds.
LONG_GUIDES = ("train/README.md", "COMPRESS.md", "command/README.md", "budget/README.md")
SUBPACKAGES = sorted(path.parent.name for path in (ROOT / "bcdl_jax").glob("*/__init__.py"))


# The largest difference between a printed number that rounding changes and the number in a guide, relative to the larger one.
TOLERANCE = 0.05
# A number below this one may be the error of rounding alone, which differs from one machine to another.
ROUNDING = 1e-5
INTEGER = r"[-+]?\d[\d,]*"
NUMBER = rf"{INTEGER}(?:\.\d*)?(?:e[-+]?\d+)?"


def blocks_of(path: Path) -> list[tuple[str, str]]:
    """The Python blocks of a page, each with the text block that follows it and shows its output; "" without one."""
    return re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", path.read_text(), re.DOTALL)


def code_of(path: Path) -> str:
    """The Python blocks of a page, one after the other."""
    return "\n".join(code for code, _ in blocks_of(path))


def run(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch, namespace: dict[str, object] | None = None) -> str:
    """Runs code in a directory and a namespace, a new one by default; returns its output."""
    monkeypatch.chdir(directory)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(
            compile(code, "<guide>", "exec", dont_inherit=True),
            {"__name__": "guide"} if namespace is None else namespace,
        )
    return printed.getvalue()


def agree(printed: str, shown: str, following: str) -> bool:
    """Whether a printed number agrees with the one in a guide, which the text ``following`` comes after.

    Counts must be equal. The guides print a KL in whole nats: it is a rounded real number, which depends on the machine.
    """
    one, other = (float(number.replace(",", "")) for number in (printed, shown))
    if re.fullmatch(INTEGER, shown) and not following.startswith(" nats"):
        return one == other
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=ROUNDING)


def assert_shown(printed: str, shown: str) -> None:
    """Compares an output with the text in a guide: "..." stands for any text, and real numbers agree up to ``TOLERANCE``."""
    pattern, numbers, shown = "", [], shown.strip()
    for match in re.finditer(rf"\.\.\.|(?<![\w.])(?P<number>{NUMBER})|\s+|.", shown):
        part = match[0]
        if part == "...":
            pattern += ".*?"
        elif part.isspace():
            pattern += r"\s+"
        elif match["number"]:
            pattern += f"({NUMBER})"
            numbers.append((part, shown[match.end() :]))
        else:
            pattern += re.escape(part)
    message = f"The code prints\n{printed}\nThe guide shows\n{shown}"
    found = re.fullmatch(pattern, printed.strip(), re.DOTALL)
    assert found, message
    for one, (other, following) in zip(found.groups(), numbers, strict=True):
        assert agree(one, other, following), message


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if str(path).endswith(LONG_GUIDES) else path for path in GUIDES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_guide_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch):
    namespace = {"__name__": "guide"}
    for code, shown in blocks_of(path):
        assert_shown(run(code, tmp_path, monkeypatch, namespace), shown)


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("a 1,868 of [1. 2.]\n", "a 1,868 of [1. 2.]\n"),
        ("2.61x", "2.6x"),
        ("a KL of 33 nats", "a KL of 34 nats"),
        ("difference 0", "difference 1.2e-07"),
        ("The file is damaged: its checksum is wrong.\n", "The file ...\n"),
    ],
)
def test_an_output_agrees_with_the_guide(printed, shown):
    assert_shown(printed, shown)


@pytest.mark.parametrize("shown", ["a 101 of", "a 100 or", "a 100 of 7", "a 110. of", "a 1.2e-7 of", ""])
def test_an_output_that_the_guide_does_not_show_is_found(shown):
    with pytest.raises(AssertionError, match="The guide shows"):
        assert_shown("a 100 of", shown)


def readme_numbers(text: str) -> list[float]:
    """The numbers in an output of the README: bytes saved, work saved, the error before and after."""
    pattern = r"coded params: .* \(([\d.]+)x\).*\nmultiply-adds of two examples: .* \(([\d.]+)x\)\n.*\n([\d.]+) % error\n([\d.]+) % error\n"
    return [float(part) for part in re.search(pattern, text, re.DOTALL).groups()]


def test_the_readme_runs_and_compresses(tmp_path, monkeypatch):
    """The tests compile in another way than users do, and training amplifies the differences of rounding. So the numbers may differ here."""
    fewer_bytes, less_work, before, after = readme_numbers(run(code_of(README), tmp_path, monkeypatch))
    assert fewer_bytes > 15
    assert less_work > 2.5
    assert after < 0.6 * before
    assert (tmp_path / "model.bcdn").stat().st_size > 4 * 5110 / fewer_bytes


@pytest.mark.slow
def test_the_readme_prints_what_it_shows(tmp_path):
    """In a process of its own, as users have it: the other tests compile with fewer optimisations and another code generator."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    code = f"import re\nfrom pathlib import Path\nexec({code_of(README)!r}, {{}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (shown,) = [shown for _, shown in blocks_of(README) if shown]
    expected, found = readme_numbers(shown), readme_numbers(done.stdout)
    assert found[:2] == pytest.approx(expected[:2], rel=0.1)
    assert found[2:] == pytest.approx(expected[2:], abs=0.7)


# Users' settings of JAX. A few epochs are enough to see that everything runs.
SETTINGS = {
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "x64": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "legacy_keys": contextlib.nullcontext,
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_readme_runs_under(setting, tmp_path, monkeypatch):
    code = code_of(README).replace("steps=800", "steps=4").replace("steps=100", "steps=4")
    if setting == "legacy_keys":
        code = code.replace("jax.random.key(", "jax.random.PRNGKey(")
    with SETTINGS[setting]():
        printed = run(code, tmp_path, monkeypatch)
    assert "multiply-adds of two examples: 10,000 -> " in printed


def test_the_readme_is_one_page():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL).splitlines()
    assert max(map(len, prose)) <= 120


def links(path: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]


@pytest.mark.parametrize(
    "path",
    [README, *GUIDES, *(ROOT / "experiments").glob("**/README.md")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(path):
    assert [link for link in links(path) if not (path.parent / link).exists()] == []


def edit_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for index, left in enumerate(first, start=1):
        row, before = [index], row
        for column, right in enumerate(second, start=1):
            row.append(min(before[column] + 1, row[-1] + 1, before[column - 1] + (left != right)))
    return row[-1]


def public_names() -> dict[str, object]:
    """All public names, those of the subpackages as "train.make_train_step"."""
    names = {name: getattr(bcdl_jax, name) for name in bcdl_jax.__all__ if name not in SUBPACKAGES}
    for package in SUBPACKAGES:
        module = getattr(bcdl_jax, package)
        names |= {f"{package}.{name}": getattr(module, name) for name in module.__all__ if name not in names}
    return names


def test_the_main_road_has_few_names():
    flat = [name for name in bcdl_jax.__all__ if name not in SUBPACKAGES]
    assert 30 <= len(flat) <= 40
    assert set(SUBPACKAGES) <= set(bcdl_jax.__all__)
    for name, value in public_names().items():
        assert value.__doc__, name


def test_no_two_public_names_differ_by_a_letter():
    names = sorted({name.rpartition(".")[2].lower() for name in public_names()})
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    assert [pair for pair in pairs if edit_distance(*pair) < 2] == []


def names_in(code: str) -> set[str]:
    """All names and attributes that code mentions."""
    nodes = list(ast.walk(ast.parse(code)))
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    found |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return found | {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_every_public_name_is_shown():
    shown = names_in("\n".join(code_of(path) for path in [README, *GUIDES]))
    assert sorted(name for name in public_names() if name.rpartition(".")[2] not in shown) == []
