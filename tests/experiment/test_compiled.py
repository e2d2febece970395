"""Compiled programs kept in the user's cache folder: where, when, and what goes wrong there."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import pytest

from mtl_jax.experiment import compiled

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def unset():
  """A JAX of which nobody has asked anything; all is put back afterwards."""
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
           "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  with warnings.catch_warnings():
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize("environment, expected", [
    ({"XDG_CACHE_HOME": "/scratch/ada"}, "/scratch/ada/mtl_jax/compiled"),
    ({"XDG_CACHE_HOME": "relative"}, "/home/ada/.cache/mtl_jax/compiled"),
    ({}, "/home/ada/.cache/mtl_jax/compiled")])
def test_the_folder_is_the_users(monkeypatch, environment, expected):
  monkeypatch.setenv("HOME", "/home/ada")
  assert compiled.folder(environment) == pathlib.Path(expected)


def test_programs_are_kept_where_only_the_user_writes(unset, tmp_path, capsys):
  compiled.keep({"XDG_CACHE_HOME": str(tmp_path)})
  path = tmp_path / "mtl_jax" / "compiled"
  assert jax.config.jax_compilation_cache_dir == str(path)
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.2
  assert path.stat().st_mode & 0o777 == 0o700
  assert not capsys.readouterr().out


@pytest.mark.parametrize("name, value", [
    ("jax_compilation_cache_dir", "/somewhere/else"), ("jax_compilation_cache_dir", ""),
    ("jax_enable_compilation_cache", False)])
def test_what_the_user_has_set_in_jax_stays(unset, tmp_path, name, value):
  jax.config.update(name, value)
  path = jax.config.jax_compilation_cache_dir
  compiled.keep({"XDG_CACHE_HOME": str(tmp_path)})
  assert jax.config.jax_compilation_cache_dir == path
  assert not list(tmp_path.iterdir())


def test_the_users_shortest_time_stays(unset, tmp_path):
  before = jax.config.jax_persistent_cache_min_compile_time_secs
  compiled.keep({"XDG_CACHE_HOME": str(tmp_path),
                 "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"})  # which JAX itself has read
  assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def a_file(cache):
  (cache / "mtl_jax").write_text("")


def open_to_all(cache):
  (cache / "mtl_jax" / "compiled").mkdir(parents=True)
  (cache / "mtl_jax" / "compiled").chmod(0o777)


@pytest.mark.parametrize("spoil, found", [
    (a_file, "Not a directory"), (open_to_all, "one not writable by this user alone")])
def test_a_folder_that_will_not_do_is_warned_of_and_left_alone(unset, tmp_path, capsys, spoil,
                                                                found):
  spoil(tmp_path)
  compiled.keep({"XDG_CACHE_HOME": str(tmp_path)})
  assert jax.config.jax_compilation_cache_dir is None
  said = capsys.readouterr().out
  assert said.startswith("warning: ") and len(said.splitlines()) == 1
  assert f"found: {found}; compiling anew" in said and str(tmp_path / "mtl_jax/compiled") in said


def test_the_oldest_programs_beyond_the_limit_and_empty_files_go(unset, tmp_path):
  path = tmp_path / "mtl_jax" / "compiled"
  path.mkdir(parents=True)
  for age, (name, size) in enumerate([("new", 60), ("empty", 0), ("mid", 40), ("old", 10)]):
    (path / f"{name}-cache").write_bytes(b"x" * size)
    os.utime(path / f"{name}-cache", (1000 - age, 1000 - age))
  (path / "another").write_bytes(b"x" * 500)
  compiled.keep({"XDG_CACHE_HOME": str(tmp_path)}, limit=100)
  assert {file.name for file in path.iterdir()} == {"new-cache", "mid-cache", "another"}


PROGRAM = """
import os
from mtl_jax.experiment import compiled
compiled.keep(os.environ)
import jax, jax.numpy as jnp
print(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.linspace(0, 1, 64).reshape(8, 8)).tobytes())
"""


@pytest.mark.slow
def test_a_program_found_gives_the_same_bits_and_a_damaged_one_is_compiled_anew(tmp_path):
  environment = {name: value for name, value in os.environ.items()
                 if name not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
  environment["XDG_CACHE_HOME"] = str(tmp_path)

  def launched():
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout, {file.name: file.stat().st_mtime_ns
                         for file in (tmp_path / "mtl_jax/compiled").iterdir()}

  cold, files = launched()
  assert files and launched() == (cold, files)
  for name in files:
    file = tmp_path / "mtl_jax/compiled" / name
    file.write_bytes(file.read_bytes()[:300])
  assert launched()[0] == cold
