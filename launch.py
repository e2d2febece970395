"""Trains, evaluates or inspects what a config file describes.

  python launch.py --config=configs/cifar_mtl.py[:arg] [--workdir=runs/x]
                   [--mode=train|evaluate|inspect] [--config.a.b=value …]
"""

import argparse
import gc
import logging
import os
import pathlib
import re
import shlex
import signal
import sys

MODES = ("train", "evaluate", "inspect")


class _Parser(argparse.ArgumentParser):

  def error(self, message: str):
    raise argparse.ArgumentTypeError(f"{message}; expected --config=FILE[:ARG] [--workdir=DIR] "
                                     f"[--mode={'|'.join(MODES)}] [--config.a.b=value …]")


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                   allow_abbrev=False)
  parser.add_argument("--config", required=True, help="config file, with :arg for its argument")
  parser.add_argument("--workdir", help="run folder; runs/<config name> when left out")
  parser.add_argument("--mode", default="train", help=" or ".join(MODES))
  overrides = [text for text in argv if text.startswith("--config.")]
  arguments = parser.parse_args([text for text in argv if text not in overrides])
  if arguments.mode not in MODES:
    parser.error(f"argument --mode: found {arguments.mode!r}")
  if not arguments.workdir:
    path, _, argument = arguments.config.partition(":")
    words = [pathlib.Path(path).stem, *re.split(",|/|~", argument.replace("=", "-"))]
    arguments.workdir = pathlib.Path("runs") / "_".join(word for word in words if word)
  arguments.overrides = overrides
  return arguments


def _quiet() -> None:
  """Keeps Orbax from printing beside the one message that tells of a failed save or read."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  tell = sys.unraisablehook
  sys.unraisablehook = lambda unraisable: (
      None if str(unraisable.exc_value) == "Event loop is closed" else tell(unraisable))


def main(argv: list[str]) -> int:
  """Runs one command; returns the exit code."""
  again = shlex.join(["python", "launch.py", *argv])
  try:
    return _run(_arguments(argv), again)
  except argparse.ArgumentTypeError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"stopped; the same command continues: {again}", file=sys.stderr)
    return 130


def _run(arguments: argparse.Namespace, again: str) -> int:
  from mtl_jax.errors import UserError  # Here: jax takes seconds.
  try:
    from mtl_jax.experiment import (allocator, build, compiled, config, fields, folds, inspection,
                                    loop, seeds)
    complete = fields.complete(config.load(arguments.config, arguments.overrides))
    compiled.keep(os.environ)
    allocator.keep_freed(os.environ)
    in_turn = complete.data.folds and complete.data.fold is None
    room = (inspection if arguments.mode == "inspect" else folds if in_turn else
            seeds if complete.seeds > 1 else loop)
    run = getattr(room, arguments.mode)
    try:
      run(complete if room in (folds, seeds) else build.build(complete), arguments.workdir)
    except loop.Interrupted as interruption:
      print(f"stopped by {signal.Signals(interruption.args[0]).name} and saved; the same command "
            f"continues: {again}", file=sys.stderr)
      return 128 + interruption.args[0]
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    if not error.filename:
      raise
    print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  gc.set_threshold(100_000)  # a tenth of the start was collections that found nothing
  _quiet()
  sys.exit(main(sys.argv[1:]))
