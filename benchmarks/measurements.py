"""The measurements behind the table of `run.py`: each gives figures, ratios of medians."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import loop
import numpy as np
from peers import NOT_INSTALLED, Peers
import step as steps
from timing import Sample, medians, on_accelerator, sample_of

from mtl_jax import balancing
from mtl_jax.experiment.stepper import stepper
from mtl_jax.training.sharding import create_sharded, data_mesh

EXACT = ("pcgrad", "cagrad", "mgda", "nash_mtl", "upgrad")
REPOSITORY = pathlib.Path(__file__).parents[1]


class Figure(NamedTuple):
  """One number of the table.

  Attributes:
    key: of its target in `run.TARGETS`.
    what: variant and size, in words.
    value: None where it could not be measured, and `note` says why.
    note: medians and sizes behind the value.
    tasks: T, which some targets depend on.
  """

  key: str
  what: str
  value: float | None
  note: dict[str, Any]
  tasks: int = 0


class Program(NamedTuple):
  """A compiled step of ours that has run once.

  Attributes:
    sample: of the step.
    losses: [T] of its first step.
    bytes: of its arguments, results and temporaries.
    shared: how many parameters the tasks share.
  """

  sample: Sample
  losses: Any
  bytes: int
  shared: int


class Session(NamedTuple):
  """What all measurements are given.

  Attributes:
    peers: PyTorch's process.
    quick: whether to measure the small sizes, with few rounds.
  """

  peers: Peers
  quick: bool

  def of(self, quick: Any, full: Any) -> Any:
    """A size or a list, by how long the measurement may take."""
    return quick if self.quick else full

  def medians(self, samples: dict[Any, Sample], **how: Any) -> dict[Any, float]:
    """Medians in seconds; see `timing.medians`, also for how."""
    return medians(samples, self.of(2, 9), longest=self.of(4.0, 24.0), **how)

  @property
  def steps(self) -> int:
    """Steps of a real run, the same for all, so that their programs are."""
    return self.of(30, 120)

  @property
  def per_sample(self) -> int:
    """Steps in a sample: a single one tells nothing of a device that is asked in advance."""
    return 20 if on_accelerator() else 1

  def ours(self, variants: Mapping[Any, Mapping[str, Any]], **size: Any) -> dict[Any, Program]:
    """Our steps, each compiled and run once.

    Args:
      variants: by a name of ours, `balancer` and where they matter `engine`, `every`, `count` of
        steps in a sample, and `in_one`, of `step.build`.
      **size: arguments of `step.build` for all of them.
    """
    def program(balancer: str, engine: str = "exact", every: int = 1, count: int | None = None,
                in_one: int = 0) -> Program:
      options = {"every": every} if every > 1 else {}
      step, state, batch = steps.build(balancing.get(balancer, **options), engine, in_one=in_one,
                                       **size)
      step = step.lower(state, batch).compile()
      memory = step.memory_analysis()
      shared = sum(x.size for x in jax.tree.leaves(state.params["sharing"]))  # steps donate it
      sample, logs = sample_of(step, state, batch, steps=count or self.per_sample)
      return Program(lambda: sample() / max(in_one, 1), logs["losses"],
                     memory.argument_size_in_bytes + memory.output_size_in_bytes
                     + memory.temp_size_in_bytes - memory.alias_size_in_bytes, shared)
    return {name: program(**variant) for name, variant in variants.items()}

  def theirs(self, ways: Sequence[str], samples: dict[Any, Sample], losses: Any,
             layouts: Sequence[str] = ("channels_first",), **size: Any) -> None:
    """Adds samples of PyTorch's steps `(way, layout)` on the same weights and batch.

    Args:
      ways: of `torch_side.py`.
      samples: added to where a way is installed.
      losses: [T] of our first step, which theirs have to be.
      layouts: of `torch_side.Training`.
      **size: arguments of `step.build`.

    Raises:
      RuntimeError: where the losses are others, so that the networks are not the same.
    """
    if not self.peers.start():
      return
    _, state, batch = steps.build(balancing.get("equal"), "exact", **size)
    labels = jnp.stack([batch["s"][f"y{i}"] for i in range(size["num_tasks"])])
    file = self.peers.write(state.params, batch["s"]["image"], labels)
    for way in ways:
      for layout in layouts:
        added = self.peers.add(f"{way}/{layout}", self.per_sample, file=file, way=way,
                               network=size.get("trunk", "cnn"), layout=layout,
                               precision=size.get("precision", "float32"))
        if added == NOT_INSTALLED:
          continue
        samples[way, layout], found = added
        if not np.allclose(found, losses, rtol=2e-2 if on_accelerator() else 1e-4):
          raise RuntimeError(f"{way}: expected our first step's losses {losses}, found {found}")


def figure_of(key: str, what: str, found: dict[Any, float], over: Any, under: Any,
              size: dict[str, Any]) -> Figure:
  """The ratio of two medians; no value where one of them is missing."""
  milliseconds = {part if isinstance(part, str) else " ".join(map(str, part)):
                  round(1e3 * found[part], 3) for part in (over, under) if part in found}
  note = {"milliseconds": milliseconds, **size}
  if over not in found or under not in found:
    return Figure(key, what, None, {**note, "why": NOT_INSTALLED}, size["num_tasks"])
  return Figure(key, what, found[over] / found[under], note, size["num_tasks"])


def _against_eager(session: Session, key: str, in_one: int,
                   size: dict[str, Any]) -> Iterator[Figure]:
  """Our equal-weights step, alone and several in one program, against PyTorch's faster layout."""
  alone = {"ours": {"balancer": "equal"}}
  ours = session.ours(session.of(alone, {
      **alone, "ours, in one program": {"balancer": "equal", "in_one": in_one}}), **size)
  samples = {name: program.sample for name, program in ours.items()}
  layouts = ("channels_first", "channels_last")
  session.theirs(["equal"], samples, ours["ours"].losses, layouts, **size)
  found = session.medians(samples)
  session.peers.drop()
  best = min((part for part in found if part[0] == "equal"), key=found.get, default=None)
  peer = f"times as fast as PyTorch eager ({best[1] if best else NOT_INSTALLED})"
  yield figure_of(key, peer, found, best, "ours", size)
  if not session.quick:
    yield figure_of(key, f"{in_one} steps in one program: {peer}", found, best,
                    "ours, in one program", size)


def equal_weights(session: Session) -> Iterator[Figure]:
  """The reference network, plain."""
  size = {"num_tasks": 2, "batch_size": session.of(64, 256)}
  yield from _against_eager(session, "equal/torch", 8, size)


def resnet18(session: Session) -> Iterator[Figure]:
  """ResNet-18, plain; on accelerators, both sides in bfloat16."""
  size = {"num_tasks": 3, "batch_size": session.of(4, 128), "trunk": "resnet18",
          "precision": "bfloat16" if on_accelerator() else "float32"}
  yield from _against_eager(session, "resnet18/torch", 2, size)


def exact_methods(session: Session) -> Iterator[Figure]:
  """Methods by exact task gradients, against both peers and against equal weights."""
  for num_tasks in session.of((2,), (2, 9)):
    size = {"num_tasks": num_tasks, "batch_size": session.of(64, 256)}
    names = session.of(("mgda",), EXACT)
    ours = session.ours({name: {"balancer": name} for name in ("equal", *names)}, **size)
    own = {name: program.sample for name, program in ours.items()}
    samples = dict(own)
    ways = [f"{library}:{name}" for name in names for library in ("libmtl", "torchjd")]
    session.theirs(ways, samples, ours["equal"].losses, **size)
    found = session.medians(samples, once=[way for way in samples
                                           if way[0].startswith("torchjd")])
    session.peers.drop()
    # In more rounds: one with theirs takes half a minute.
    alone = session.medians(own, base="equal")
    for name in names:
      for library in ("libmtl", "torchjd"):
        yield figure_of(f"exact/{library}", f"{name}: times as fast as {library}", found,
                        (f"{library}:{name}", "channels_first"), name, size)
      yield figure_of("exact/equal", f"{name}: times equal weights", alone, name, "equal", size)


def own_streams(session: Session) -> Iterator[Figure]:
  """Two data sets through one trunk as one batch."""
  size = {"num_tasks": 2, "batch_size": session.of(32, 128), "own_streams": True}
  names = ("equal", *session.of(("mgda",), EXACT))
  ours = session.ours({name: {"balancer": name} for name in names}, **size)
  found = session.medians({name: program.sample for name, program in ours.items()}, base="equal")
  for name in names[1:]:
    yield figure_of("own_streams/equal", f"{name}: times equal weights", found, name, "equal",
                    size)


def many_tasks(session: Session) -> Iterator[Figure]:
  """Forty tasks, or four: what each engine costs, in time and in memory."""
  size = {"num_tasks": session.of(4, 40), "batch_size": session.of(16, 128)}
  keeping = -(-session.per_sample // 10) * 10  # each decision with its keeping
  variants = {f"features {name}": {"balancer": name, "engine": "features"}
              for name in session.of(("mgda",), EXACT)}
  variants |= {engine: {"balancer": "mgda", "engine": engine}
               for engine in ("matrix_free", "sketched")}
  variants["every_10"] = {"balancer": "mgda", "every": 10, "count": keeping}
  exact = session.of({}, {"exact": {"balancer": "mgda"}})
  ours = session.ours({"equal": {"balancer": "equal"}, **exact, **variants}, **size)
  found = session.medians({name: ours[name].sample for name in ("equal", *variants)}, base="equal")
  for name, variant in variants.items():
    engine = name.partition(" ")[0]
    yield figure_of(f"{engine}/equal", f"{variant['balancer']}, {engine}: times equal weights",
                    found, name, "equal", size)
  megabytes = {name: program.bytes / 1e6 for name, program in ours.items()}
  for engine, name in (("features", "features mgda"), ("matrix_free", "matrix_free"),
                       ("sketched", "sketched")):
    yield Figure("memory/equal", f"{engine}: peak memory over that of equal weights",
                 megabytes[name] / megabytes["equal"],
                 {"megabytes": {engine: megabytes[name], "equal": megabytes["equal"]}, **size})
  rows = 4e-6 * size["num_tasks"] * ours["equal"].shared
  for engine in exact:
    yield Figure("memory/rows", f"{engine}: what it adds, in T x P floats",
                 (megabytes[engine] - megabytes["equal"]) / rows,
                 {"megabytes": {engine: megabytes[engine], "equal": megabytes["equal"],
                                "T x P": rows}, **size})


def real_loop(session: Session) -> Iterator[Figure]:
  """The whole loop against the bare step."""
  command = [sys.executable, str(pathlib.Path(loop.__file__)), f"--steps={session.steps}",
             f"--repeats={session.of(1, 3)}"]
  # A process of its own, as a run is: this one has grown by all that was measured before.
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  if jax.config.jax_compilation_cache_dir:
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
  lines = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, text=True,
                         stdout=subprocess.PIPE).stdout.splitlines()
  rates = {line["what"]: line["images_per_second"] for line in map(json.loads, lines)}
  for engine in (name for name in rates if name != "bare step"):
    yield Figure("loop/bare", f"{engine}: images a second over those of the bare step",
                 rates[engine] / rates["bare step"],
                 {"images_per_second": rates})


def seeds(session: Session) -> Iterator[Figure]:
  """Seeds in one program against a program for each, steps alone, data drawn and augmented."""
  count, file = session.of(2, 8), str(REPOSITORY / "configs" / "cifar_mtl.py")
  with tempfile.TemporaryDirectory() as data_dir, contextlib.ExitStack() as stack:
    experiments = [loop.experiment_of(file, session.steps, "resident", data_dir, seed)
                   for seed in range(count)]

    def sample(several: Sequence[Any], in_a_sample: int) -> Sample:
      steps, mesh = stepper(several, data_mesh(), 0, stack), data_mesh()
      states = [create_sharded(one.first_state, mesh)
                for one in several]
      return sample_of(lambda states, _: steps(states, 1), states, None,
                       steps=in_a_sample * session.per_sample)[0]
    # As many steps of the one as of all together, so that both are disturbed for as long.
    found = session.medians({"together": sample(experiments, 1),
                             "alone": sample(experiments[:1], count)})
  yield Figure("seeds/alone", f"{count} seeds in one program: times as fast as {count} runs",
               count * found["alone"] / found["together"],
               {"milliseconds": {"together": 1e3 * found["together"],
                                 "one alone": 1e3 * found["alone"]}})


def start(session: Session) -> Iterator[Figure]:
  """From the command to the first record, without and with compiled programs on disk."""
  with tempfile.TemporaryDirectory() as folder:
    for what, times in (("cold", 1), ("warm", session.of(1, 3))):
      found = [_seconds_to_first_record(pathlib.Path(folder), f"{what}{i}") for i in range(times)]
      yield Figure(f"start/{what}", f"seconds to the first training record, {what}",
                   statistics.median(found), {"seconds": found})


def _seconds_to_first_record(folder: pathlib.Path, run: str) -> float:
  """Launches a run and stops it at its first training record.

  Event files are written at once, unlike `metrics.jsonl`. Compiled programs stay in the folder.
  """
  environment = {**os.environ, "XDG_CACHE_HOME": str(folder),
                 "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "launch.py", "--config=configs/cifar_mtl.py",
             f"--workdir={folder / run}", f"--config.data.dir={folder}",
             "--config.data.download=False", "--config.data.missing=sample",
             "--config.train.log_every_steps=1", "--config.train.steps_per_call=1"]
  begin = time.perf_counter()
  process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
  try:
    while not any(b"train/" in path.read_bytes()
                  for path in (folder / run).glob("events.out.tfevents.*")):
      if process.poll() is not None:
        raise RuntimeError(f"launch.py: expected a run, found {process.stderr.read()}")
      time.sleep(0.02)
    return time.perf_counter() - begin
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


MEASUREMENTS = {
    "equal": equal_weights,
    "exact": exact_methods,
    "own_streams": own_streams,
    "many_tasks": many_tasks,
    "loop": real_loop,
    "seeds": seeds,
    "start": start,
    "resnet18": resnet18,
}
