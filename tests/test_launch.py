"""Real launches on the bundled sample: killed, out of disk, continued."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def command(tmp_path, workdir, *more):
  return [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT}/configs/cifar_mtl.py",
          f"--workdir={tmp_path / workdir}", f"--config.data.dir={tmp_path / 'data'}",
          "--config.data.download=False", "--config.trunk.channels=4,8", "--config.trunk.width=16",
          "--config.data.batch_size=32", "--config.train.steps=160",
          "--config.train.evaluate_every_steps=20", "--config.train.log_every_steps=1",
          "--config.balancer.name=uncertainty", *more]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One device, and compiled programs kept between launches."""
  cache = tmp_path_factory.mktemp("compiled")
  return {**{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}, "JAX_PLATFORMS": "cpu",
          "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
          "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def finish(argv, environment):
  return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)


def limited(kilobytes, argv):
  """The command in a shell in which no file may grow beyond a size."""
  return ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-", *argv]


def records(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


def checksums(folder, step=160):
  record = json.loads((folder / "checkpoints" / str(step) / "record" / "metadata").read_text())
  return json.loads(record["text"])["checksums"]


def stop_after(argv, environment, folder, lines, number):
  """Starts a launch and sends it a signal once metrics.jsonl has grown by `lines` lines."""
  count = lambda: (len((folder / "metrics.jsonl").read_bytes().splitlines())
                   if (folder / "metrics.jsonl").exists() else 0)
  process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
  checkpoints = folder / "checkpoints"
  before, deadline = {p.name for p in checkpoints.glob("*")}, time.monotonic() + 200
  goal = count() + lines
  while process.poll() is None and time.monotonic() < deadline:
    # Either enough has been logged, or a save has just begun.
    if count() >= goal or {p.name for p in checkpoints.glob("*tmp*")} - before:
      break
    time.sleep(0.002)
  process.send_signal(number)
  _, err = process.communicate(timeout=200)
  return process.returncode, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
  """An uninterrupted run."""
  tmp_path = tmp_path_factory.mktemp("whole")
  done = finish(command(tmp_path, "run"), environment)
  assert done.returncode == 0, done.stderr
  return tmp_path / "run", done


def test_a_whole_launch_tells_what_it_does(whole):
  folder, done = whole
  assert "SAMPLE DATA" in done.stdout and "results on SAMPLE DATA" in done.stdout
  assert "validation cifar10: loss" in done.stdout and "cifar100" in done.stdout
  assert done.stderr == ""
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["data"] == {"cifar10": "sample", "cifar100": "sample"}
  assert summary["steps"] == 160 and list(folder.glob("events.out.tfevents*"))


def kill_and_compare(tmp_path, environment, whole, deaths):
  folder = tmp_path / "run"
  for lines in deaths:
    code, _ = stop_after(command(tmp_path, "run"), environment, folder, lines, signal.SIGKILL)
    assert code in (-signal.SIGKILL, 0)
  done = finish(command(tmp_path, "run"), environment)
  assert done.returncode == 0, done.stderr
  assert checksums(folder) == checksums(whole[0])
  assert records(folder) == records(whole[0])
  again = finish([*command(tmp_path, "run"), "--mode=evaluate"], environment)
  assert again.returncode == 0 and "reproduced exactly" in again.stdout


@pytest.mark.slow
def test_killed_launches_end_as_one_that_was_not(tmp_path, environment, whole):
  kill_and_compare(tmp_path, environment, whole, deaths=[100, 7])


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [[1, 1, 1], [100, 100, 100, 100], [20, 100, 3, 17]])
def test_many_kills(tmp_path, environment, whole, deaths):
  kill_and_compare(tmp_path, environment, whole, deaths)


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, environment, whole, number):
  folder = tmp_path / "run"
  code, err = stop_after(command(tmp_path, "run"), environment, folder, 7, number)
  assert code == 128 + number
  assert err.startswith(f"stopped by {number.name} and saved; the same command continues: python")
  done = finish(command(tmp_path, "run"), environment)
  assert done.returncode == 0 and "continuing from step" in done.stdout
  assert checksums(folder) == checksums(whole[0])
  assert records(folder) == records(whole[0])


@pytest.mark.slow
def test_a_full_disk_is_said_and_what_was_there_survives(tmp_path, environment, whole):
  """No file may grow beyond 20 kB: the run's first checkpoints do not fit."""
  folder = tmp_path / "run"
  code, _ = stop_after(command(tmp_path, "run"), environment, folder, 17, signal.SIGTERM)
  assert code == 128 + signal.SIGTERM
  before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
  done = finish(limited(20, command(tmp_path, "run")), environment)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) <= 3
  assert {p: p.read_bytes() for p in before} == before
  done = finish(command(tmp_path, "run"), environment)
  assert done.returncode == 0, done.stderr
  assert checksums(folder) == checksums(whole[0])


@pytest.mark.slow
def test_a_disk_that_fills_between_checkpoints_does_not_hang(tmp_path, environment):
  argv = command(tmp_path, "run", "--config.train.evaluate_every_steps=160")
  done = finish(limited(9, argv), environment)
  assert done.returncode == 2, done.stderr
  assert "expected room and permission to write, found: File too large" in done.stderr
  assert len(done.stderr.strip().splitlines()) <= 3
