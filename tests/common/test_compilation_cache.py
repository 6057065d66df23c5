"""A program that was compiled once is loaded by later commands."""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from cptjax.common import compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def no_folder(monkeypatch, tmp_path):
    """The settings of a user who has chosen no folder; the tests' own are put back."""
    monkeypatch.setattr(compilation_cache, "MIN_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_twice(number: float) -> list[str]:
    """Compile a program, drop it from memory, compile it again; return the cache's events."""
    events: list[str] = []
    jax_cache.reset_cache()
    listener = lambda name, **_: events.append(name.rsplit("/", 1)[-1])
    monitoring.register_event_listener(listener)
    try:
        for _ in range(2):
            jax.clear_caches()
            jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()
    finally:
        monitoring.unregister_event_listener(listener)
    return [name for name in events if name in ("cache_hits", "cache_misses")]


@pytest.mark.parametrize("named", [False, True])
def test_the_second_command_loads_what_the_first_compiled(no_folder, named):
    folder = no_folder / "mine" if named else compilation_cache.default_folder()
    compilation_cache.keep_compiled_programs(str(folder) if named else "")
    events = compile_twice(0.25 if named else 0.5)
    assert events.count("cache_misses") == events.count("cache_hits") >= 1
    assert len(list(folder.glob("*-cache"))) == events.count("cache_misses")
    assert folder.is_relative_to(no_folder)


def test_off_keeps_nothing(no_folder):
    compilation_cache.keep_compiled_programs("off")
    assert compile_twice(0.75) == []
    assert not (no_folder / "cache").exists()


def test_a_folder_that_the_user_chose_for_jax_is_kept(no_folder):
    jax.config.update("jax_compilation_cache_dir", str(no_folder / "own"))
    compilation_cache.keep_compiled_programs("")
    assert jax.config.jax_compilation_cache_dir == str(no_folder / "own")


def test_a_folder_that_cannot_be_made_is_named(no_folder, capsys):
    (no_folder / "cache").write_text("a file")
    compilation_cache.keep_compiled_programs("")
    assert "compiled programs are not kept" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None


def test_another_kind_of_cpu_has_another_folder(monkeypatch):
    here = compilation_cache.default_folder()
    monkeypatch.setattr(compilation_cache, "_cpu", lambda: "flags: none")
    assert compilation_cache.default_folder() != here
