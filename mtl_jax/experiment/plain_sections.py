"""The config sections that no factory describes: their fields, types and defaults."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataSection:
  """Fields of `config.data`.

  Attributes:
    streams: `{stream: {"name": source, …}}`, each perhaps with an `augmentation` of its own.
    batch_size: examples of each stream in a step, over all devices.
    dir: where TFDS keeps prepared data.
    missing: when a data set cannot be had: "error", "sample", or "auto" (the sample on a single
      process with CPUs only, else an error).
    download: whether missing archives may be downloaded.
    engine: "resident" on the device, "grain" from the host, or "auto" by size.
    validation: fraction of train that becomes validation where a source brings none.
    drop_labels: fraction of each label of train that is taken away at random.
    folds: of k-fold cross-validation on train, each run in turn; None for one run.
    fold: the one that is held out as test; None for all in turn.
    augmentation: names, perhaps with strengths ("rotate:15", see `mtl_jax/data/augmentation.py`),
      () for none, or ("auto",) for what suits the source.
    evaluation_batch_size: examples of each stream; batch_size times 4 when None.
    threads: that read ahead for the grain engine.
  """

  streams: Mapping[str, Any]
  batch_size: int = 128
  dir: str = "~/tensorflow_datasets"
  missing: str = "auto"
  download: bool = True
  engine: str = "auto"
  validation: float = 0.1
  drop_labels: float = 0.0
  folds: int | None = None
  fold: int | None = None
  augmentation: tuple[str, ...] = ("auto",)
  evaluation_batch_size: int | None = None
  threads: int = 2


@dataclasses.dataclass(frozen=True)
class TrainSection:
  """Fields of `config.train`. Each duration is given in exactly one unit.

  Attributes:
    steps: length of the run in optimizer steps,
    epochs: or in passes over the stream that takes longest,
    examples: or in examples of each stream.
    evaluate_every_steps: between evaluations on validation, each followed by a checkpoint;
    evaluate_every_epochs: one epoch where no unit is given;
    evaluate_every_examples: of each stream.
    log_every_steps: between training records.
    steps_per_call: optimizer steps in one compiled call on resident data; 1 on CPUs and 16 on
      accelerators when None.
    gradients: engine of the task gradients, "exact", "features", "matrix_free" or "sketched", or
      a section with its name and arguments.
    precision: in which trunk and heads compute, "float32" or "bfloat16"; all else is float32.
    diagnose_every_steps: between steps whose exact Gramian is taken for the records, whatever
      the balancer and the engine; None for never.
  """

  steps: int | None = None
  epochs: float | None = None
  examples: int | None = None
  evaluate_every_steps: int | None = None
  evaluate_every_epochs: float | None = None
  evaluate_every_examples: int | None = None
  log_every_steps: int = 10
  steps_per_call: int | None = None
  gradients: str | Mapping[str, Any] = "exact"
  precision: str = "float32"
  diagnose_every_steps: int | None = None


@dataclasses.dataclass(frozen=True)
class InitFromSection:
  """Fields of `config.init_from`: what a fresh run starts from instead of random numbers.

  Patterns say parameters by names on their paths: "trunk", "heads", "heads_<task>", "layer1_*",
  "bn?/scale"; see `mtl_jax/training/parameter_groups.py`.

  Attributes:
    path: a run folder, whose best checkpoint is taken; a `.safetensors` file of our names
      ("params/sharing/trunk/conv1/kernel") or torchvision's ("layer1.0.conv1.weight"); or a `.pth`
      file of torchvision's names.
    part: "trunk" for all that is no head, "all" for the heads, too.
    except_heads: tasks whose heads stay random under "all".
    skip: patterns of what stays random besides.
    freeze: patterns of parameters that do not move and have no part in the balance. BatchNorm's
      statistics are no parameters: they go on following the data.
    learning_rate_scale: factor of the learning rate by pattern; where several match, their product.
  """

  path: str
  part: str = "trunk"
  except_heads: tuple[str, ...] = ()
  skip: tuple[str, ...] = ()
  freeze: tuple[str, ...] = ()
  learning_rate_scale: Mapping[str, float] | None = None
