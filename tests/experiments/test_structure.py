"""The order of the experiments' folders, and that they use the library's public names alone."""

from __future__ import annotations

import importlib
import re

from tests.test_structure import (
    ROOT,
    assert_no_circles,
    assert_no_upward_imports,
    imported_modules,
    long_functions,
    sources,
)

ORDER = (
    "__init__",
    "embedded",
    "runtime",
    "io",
    "networks",
    "pipeline",
    "registry",
    "report",
    "cli",
    "gallery",
    "benchmarks",
    "checks",
    "lenet300",
    "lenet5",
    "vgg",
    "score",
    "table",
    "benchmark_training",
    "benchmark_inference",
    "benchmark_shrinking",
    "crash_test",
    "parallel_check",
    "public_models",
    "gallery_train",
    "gallery_fit",
)


def test_no_folder_imports_a_later_one():
    assert_no_upward_imports("experiments", ORDER)


def test_imports_have_no_circles():
    assert_no_circles("experiments")


def test_functions_are_short():
    assert long_functions("experiments") == []


def test_the_kind_of_device_is_found_in_one_file():
    users = [path for path in sources("experiments") if re.search(r"default_backend|train\.on_cpu", path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in users] == ["experiments/runtime/backend.py"]


def test_experiments_use_public_names_alone():
    for path in sources("experiments"):
        for module in imported_modules(path):
            if not module.startswith("bcdl_jax."):
                continue
            *parents, name = module.split(".")
            package = importlib.import_module(".".join(parents))
            assert len(parents) <= 2, f"{path.relative_to(ROOT)} imports {module}"
            assert name in package.__all__, f"{path.relative_to(ROOT)} imports {module}"
