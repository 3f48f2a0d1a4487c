import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.runtime import caches, timing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = jax.config.jax_compilation_cache_dir  # The one that the tests share.
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "bcdl_jax"
    jax.config.update("jax_compilation_cache_dir", directory)


def test_the_cache_directory_is_private(cache):
    directory = caches.cache_directory("compiled")
    assert directory == cache / "compiled"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert caches.cache_directory("compiled") == directory
    directory.chmod(0o770)
    assert caches.cache_directory("compiled") is None


def test_files_and_links_are_no_cache_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert caches.cache_directory("compiled") is None
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "bcdl_jax").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.cache_directory("compiled") is None


def run_once(enabled):
    """The measured compilation of a function that no other test compiles."""
    jax.clear_caches()
    with caches.compilation_cache(enabled), timing.CompileTime() as clock:
        jax.jit(lambda x: jax.random.normal(jax.random.key(7), (33,)) * jnp.sin(x))(1.0).block_until_ready()
    return clock


def test_compiled_programs_are_cached_and_counted(cache, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setattr(caches, "_LEAST_COMPILE_SECONDS", 0.0)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    off = run_once(False)
    assert off.seconds > 0
    assert not cache.exists() or not list((cache / "compiled").iterdir())
    assert off.sentence() == f"compiled in {off.seconds:.1f} s"
    first = run_once(True)
    assert (first.hits, first.misses > 0) == (0, True)
    assert list((cache / "compiled").glob("*-cache"))
    second = run_once(True)
    assert (second.hits, second.misses) == (first.misses, 0)
    assert second.sentence() == f"compiled in {second.seconds:.1f} s, all programs from the cache"
    assert (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs) == before


def test_the_directory_of_the_environment_variable_of_jax_is_used(tmp_path):
    code = (
        "import jax\nfrom experiments.runtime import caches\n"
        "with caches.compilation_cache(True): jax.jit(lambda x: x + 1)(1.0)\n"
    )
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "given"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parents[3])
    assert list((tmp_path / "given").iterdir())
    assert not (tmp_path / "xdg").exists()
