"""The order of the library's folders: each one imports only the folders before it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "_tree",
    "_arrays",
    "_atomic_file",
    "_backend",
    "graph",
    "priors",
    "nn",
    "compression",
    "shrinking",
    "conversion",
    "codec",
    "export",
    "budget",
    "baselines",
    "train",
    "command",
    "__init__",
    "__main__",
)
LONGEST_FUNCTION = 80


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """The modules that a file imports, with "from package import name" as "package.name"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(module: str, package: str, order: tuple[str, ...]) -> int:
    """The place in the order of a module such as "bcdl_jax.graph.program"."""
    *_, rest = module.partition(f"{package}.")
    return order.index(rest.split(".")[0])


def assert_no_upward_imports(package: str, order: tuple[str, ...]) -> None:
    for path in sources(package):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        for module in imported_modules(path):
            if module.startswith(f"{package}."):
                assert rank(module, package, order) <= order.index(parts[0]), f"{path} imports {module}"


def assert_no_circles(package: str) -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(package)}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle of imports: {' -> '.join((*trail, name))}"
        if name in finished:
            return
        for module in imported_modules(names[name]):
            target = module if module in names else module.rpartition(".")[0]
            if target in names and target != name:
                visit(target, (*trail, name))
        finished.add(name)

    for name in names:
        visit(name, ())


def long_functions(package: str) -> list[str]:
    found = []
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                found.append(f"{path.relative_to(ROOT)}:{node.name}")
    return found


def test_no_folder_imports_a_later_one():
    assert {path.name for path in (ROOT / "bcdl_jax").iterdir() if (path / "__init__.py").exists()} <= set(ORDER)
    assert_no_upward_imports("bcdl_jax", ORDER)


def test_imports_have_no_circles():
    assert_no_circles("bcdl_jax")


def test_functions_are_short():
    assert long_functions("bcdl_jax") == []


def test_no_module_hides_a_public_name():
    """A module that is called like a public function would replace it in the namespace of its folder, once it is imported."""
    import bcdl_jax

    folders = [path.parent.name for path in (ROOT / "bcdl_jax").glob("*/__init__.py")]
    for package in (bcdl_jax, *(getattr(bcdl_jax, folder) for folder in folders)):
        names = [name for name in package.__all__ if package is not bcdl_jax or name not in folders]
        assert [name for name in names if inspect.ismodule(getattr(package, name))] == []
    flat = [module for module in imported_modules(ROOT / "bcdl_jax" / "__init__.py") if module.count(".") > 1]
    assert {module.rpartition(".")[2] for module in flat} & set(folders) == set()


@pytest.mark.parametrize(
    "path", [*sources("bcdl_jax"), *sources("experiments")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_layers_and_fields_are_not_found_by_name(path):
    """The name of a layer's entry stands in one file, and no beginning or end of a layer's or a field's name decides anything."""
    text = path.read_text()
    if path.name != "_tree.py":
        assert '"posterior"' not in text
    part = r"\w*(log_variance|mask|mean|kernel|bias|scale|[pP]osterior|Dense|Conv|BatchNorm)\w*"
    methods = "startswith|endswith|removesuffix|removeprefix|replace"
    assert re.findall(rf"""\.(?:{methods})\(\(?["']/?{part}["']""", text) == []
