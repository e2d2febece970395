"""All comparisons of speed side by side, and which targets are met.

  python benchmarks/run.py [--quick] [--only=equal,exact] [--out=results.json] [--peers=PYTHON]

Every figure is a ratio of medians from one run, in which the variants took turns. Prints JSON
lines: what was measured, value, target, and whether it is met. Less than 15 minutes on two cores;
with --quick, at small sizes, in few rounds and of fewer variants, less than 3, which shows that all
works and little more. A file of results names machine, versions and date.

The peers run from an environment with PyTorch and TorchJD (`pip install -e ".[peers]"`), this one
unless --peers names another's Python; where they are missing, their figures say so. Both sides
start from the same weights on the same batch, in float32, with as many threads, and their first
losses are compared. Ours keeps freed memory, as runs of `launch.py` do; PyTorch has its allocator as
it comes. What is reproduced of LibMTL, which is no package, says `libmtl_way.py`. Our step also
counts its metrics and takes norms for the logs; the peers' steps do neither. On accelerators both
multiply float32 in TensorFloat-32.

  equal        the reference network with equal weights against PyTorch eager, one step a call and
               eight in one program
  exact        methods by exact task gradients against LibMTL's way, TorchJD, and equal weights
  own_streams  two data sets, methods against equal weights
  many_tasks   forty tasks: engines against equal weights, in time and in memory
  loop         the whole loop against the bare step
  seeds        eight seeds in one program against eight runs
  start        seconds to the first training record, without and with compiled programs on disk
  resnet18     ResNet-18 with equal weights against PyTorch eager, one step a call and two in one
               program
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the peers compute there, too

import jax  # noqa: E402
from measurements import MEASUREMENTS, Figure, Session  # noqa: E402
from peers import Peers  # noqa: E402
from timing import emit, machine, on_accelerator, programs_kept  # noqa: E402

from mtl_jax.experiment import allocator  # noqa: E402
from mtl_jax.experiment.cores import cores  # noqa: E402

Bound = float | Callable[[int], float] | None  # by the number of tasks, or none


class Target(NamedTuple):
  """What a figure should be.

  Attributes:
    least: whether it is the least good value; otherwise the greatest.
    on_cpu: the bound on two cores.
    elsewhere: the bound on an accelerator.
  """

  least: bool
  on_cpu: Bound
  elsewhere: Bound

  def bound(self, tasks: int, accelerator: bool) -> float | None:
    """The bound for so many tasks."""
    bound = self.elsewhere if accelerator else self.on_cpu
    return bound(tasks) if callable(bound) else bound


def at_least(on_cpu: Bound, elsewhere: Bound = None) -> Target:
  """Greater is better."""
  return Target(True, on_cpu, elsewhere)


def at_most(both: Bound) -> Target:
  """Less is better, wherever it is measured."""
  return Target(False, both, both)


TARGETS = {
    "equal/torch": at_least(1.25, 3.0),
    "exact/libmtl": at_least(1.2, 3.0),
    "exact/torchjd": at_least(1.2, 3.0),
    "exact/equal": at_most(lambda tasks: (1 + 2 * tasks) / 3),
    "own_streams/equal": at_most(1.15),
    "features/equal": at_most(1.1),
    "every_10/equal": at_most(3.6),
    "matrix_free/equal": at_most(4.0),
    "sketched/equal": at_most(2.0),
    "memory/equal": at_most(1.3),
    "memory/rows": at_most(1.2),
    "loop/bare": at_least(0.95, 0.95),
    "seeds/alone": at_least(1.0, 4.0),
    "start/cold": at_most(12.0),
    "start/warm": at_most(6.0),
    "resnet18/torch": at_least(1.0, 1.5),
}


def judged(figure: Figure, accelerator: bool) -> dict[str, Any]:
  """The fields of a figure's line.

  >>> judged(Figure("exact/equal", "mgda: times equal weights", 1.5, {}, tasks=2), False)
  {'figure': 'exact/equal', 'what': 'mgda: times equal weights', 'value': 1.5, \
'target': '<= 1.667', 'verdict': 'met'}
  """
  target = TARGETS[figure.key]
  bound = target.bound(figure.tasks, accelerator)
  if figure.value is None:
    verdict = figure.note["why"]
  elif bound is None:
    verdict = "no target"
  else:
    met = figure.value >= bound if target.least else figure.value <= bound
    verdict = "met" if met else "missed"
  rounded = jax.tree.map(lambda x: round(x, 3) if isinstance(x, float) else x,
                         {name: x for name, x in figure.note.items() if name != "why"})
  return {"figure": figure.key, "what": figure.what,
          "value": None if figure.value is None else round(figure.value, 3),
          "target": None if bound is None else f"{'>=' if target.least else '<='} {bound:.4g}",
          "verdict": verdict, **rounded}


def figures(names: list[str], session: Session) -> Iterator[Figure]:
  """All figures of some measurements."""
  for name in names:
    yield from MEASUREMENTS[name](session)


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
  parser.add_argument("--only", default="", help="measurements, separated by commas; all if empty")
  parser.add_argument("--out", help="file of results")
  parser.add_argument("--peers", default=sys.executable, help="Python that has PyTorch")
  args = parser.parse_args(argv)
  names = args.only.split(",") if args.only else list(MEASUREMENTS)
  if unknown := sorted(set(names) - set(MEASUREMENTS)):
    parser.error(f"--only: expected some of {', '.join(MEASUREMENTS)}, found {unknown[0]!r}")

  allocator.keep_freed(os.environ)
  facts, lines = machine(), []
  if facts["load"] > facts["threads"] / 2:
    print(f"warning: the machine is busy (load {facts['load']}); the peers' threads suffer more "
          "from it than ours, so that no figure beside them counts", file=sys.stderr)
  with programs_kept(), tempfile.TemporaryDirectory() as folder, contextlib.closing(
      Peers(args.peers, cores(), pathlib.Path(folder))) as peers:
    for figure in figures(names, Session(peers, args.quick)):
      lines.append({**judged(figure, on_accelerator()), "quick": args.quick})
      emit("run", **lines[-1])
    results = {**facts, "peers": peers.versions, "quick": args.quick, "only": names,
               "figures": lines}
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
