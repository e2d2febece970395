"""How tasks share the trunk: one file a published method, one table of all of them.

| name | paper | year | looks at |
|---|---|---|---|
| `equal` | unitary scalarisation, Kurin et al., NeurIPS | 2022 | losses |
| `fixed` | constant weights, tuned by hand | | losses |
| `uncertainty` | uncertainty weighting, Kendall, Gal, Cipolla, CVPR | 2018 | losses |
| `random_weights` | random weights (RLW), Lin et al., TMLR | 2022 | losses |
| `revised_uncertainty` | uncertainty, revised, Liebel, Körner | 2018 | losses |
| `dwa` | dynamic weight average, Liu, Johns, Davison, CVPR | 2019 | losses |
| `geometric` | geometric mean (GLS), Chennupati et al., CVPR Workshops | 2019 | losses |
| `scale_invariant` | logarithms of losses, baseline of Navon et al., ICML | 2022 | losses |
| `imtl_l` | impartial losses, Liu et al., ICLR | 2021 | losses |
| `stch` | smooth Tchebycheff, Lin et al., ICML | 2024 | losses |
| `tchebycheff` | Tchebycheff (MOEA/D), Zhang, Li, IEEE TEVC | 2007 | losses |
| `pbi` | boundary intersection (MOEA/D), Zhang, Li, IEEE TEVC | 2007 | losses |
| `cosmos` | preference and angle, Ruchte, Grabocka, ICDM | 2021 | losses |
| `cov_weighting` | coefficient of variation, Groenendijk et al., WACV | 2021 | losses |
| `famo` | fast adaptive optimisation, Liu et al., NeurIPS | 2023 | losses before and after |
| `group_dro` | group robustness, Sagawa et al., ICLR | 2020 | losses |
| `go4align` | group alignment, Shen et al., NeurIPS | 2024 | losses |
| `ldc_mtl` | loss discrepancy control, Xiao et al. | 2025 | losses |
| `mgda` | multiple-gradient descent, Sener, Koltun, NeurIPS | 2018 | Gramian |
| `pcgrad` | gradient surgery, Yu et al., NeurIPS | 2020 | Gramian |
| `gradvac` | gradient vaccine, Wang et al., ICLR | 2021 | Gramian |
| `imtl_g` | impartial gradients, Liu et al., ICLR | 2021 | Gramian |
| `imtl` | impartial losses and gradients, Liu et al., ICLR | 2021 | Gramian, losses |
| `aligned_mtl` | independent component alignment, Senushkin et al., CVPR | 2023 | Gramian |
| `conflict_free` | conflict-free inverse (ConFIG), Liu, Chu, Thuerey, ICLR | 2025 | Gramian |
| `gradnorm` | gradient normalisation, Chen et al., ICML | 2018 | Gramian, losses |
| `ntkmtl` | tangent kernel traces, Qin, Wang, Yan, NeurIPS | 2025 | Gramian |
| `krum` | nearest neighbours (Multi-Krum), Blanchard et al., NeurIPS | 2017 | Gramian |
| `cagrad` | conflict-averse gradients, Liu et al., NeurIPS | 2021 | Gramian |
| `upgrad` | dual cone, each projected, Quinton, Rey | 2024 | Gramian |
| `dualproj` | dual cone, mean projected (GEM), Lopez-Paz, Ranzato, NeurIPS | 2017 | Gramian |
| `pcd` | priority-constrained descent, TMLR | 2026 | Gramian |
| `nash_mtl` | bargaining, Navon et al., ICML | 2022 | Gramian |
| `fairgrad` | fair resource allocation, Ban, Ji, ICML | 2024 | Gramian |
| `pivrg` | fair shares by lag, Qin et al., CVPR | 2025 | Gramian |
| `graddrop` | gradient sign dropout, Chen et al., NeurIPS | 2020 | task gradients |
| `trimmed_mean` | trimmed mean, Yin et al., ICML | 2018 | task gradients |
| `moco` | bias-corrected descent direction, Fernando et al., ICLR | 2023 | task gradients |
| `db_mtl` | dual balancing, Lin et al. | 2023 | task gradients, losses |
| `excess_mtl` | excess risks, He et al., ICML | 2024 | task gradients |
| `modo` | double sampling, Chen et al., NeurIPS | 2023 | Gramian of two samples |
| `sdmgrad` | direction-oriented descent, Xiao, Ban, Ji, NeurIPS | 2023 | Gramian of two samples |
| `auto_lambda` | held-out losses, Liu et al., TMLR | 2022 | look-ahead |
| `moml` | held-out losses as objectives, Ye et al., NeurIPS | 2021 | look-ahead |
| `forum` | bi-level, first order, Ye et al., ECAI | 2024 | Gramian of two samples, look-ahead |

A method is a factory that closes over its hyperparameters and returns a `Balancer`, a pair of
pure functions. To add one, write its file and enter it in `METHODS` and in this table.

>>> balancer = get("pcgrad", reduction="mean")
>>> balancer.name, sorted(balancer.needs)
('pcgrad', ['gramian'])
"""

from collections.abc import Callable
import dataclasses
import difflib
import inspect

from mtl_jax.balancing import wrappers
from mtl_jax.balancing.aligned_mtl import aligned_mtl
from mtl_jax.balancing.auto_lambda import auto_lambda
from mtl_jax.balancing.balancer import Balancer, Decision, Signals, aggregate
from mtl_jax.balancing.cagrad import cagrad
from mtl_jax.balancing.conflict_free import conflict_free
from mtl_jax.balancing.cosmos import cosmos
from mtl_jax.balancing.cov_weighting import cov_weighting
from mtl_jax.balancing.db_mtl import db_mtl
from mtl_jax.balancing.dualproj import dualproj
from mtl_jax.balancing.dwa import dwa
from mtl_jax.balancing.equal import equal
from mtl_jax.balancing.excess_mtl import excess_mtl
from mtl_jax.balancing.fairgrad import fairgrad
from mtl_jax.balancing.famo import famo
from mtl_jax.balancing.fixed import fixed
from mtl_jax.balancing.forum import forum
from mtl_jax.balancing.geometric import geometric
from mtl_jax.balancing.go4align import go4align
from mtl_jax.balancing.graddrop import graddrop
from mtl_jax.balancing.gradnorm import gradnorm
from mtl_jax.balancing.gradvac import gradvac
from mtl_jax.balancing.group_dro import group_dro
from mtl_jax.balancing.imtl import imtl
from mtl_jax.balancing.imtl_g import imtl_g
from mtl_jax.balancing.imtl_l import imtl_l
from mtl_jax.balancing.krum import krum
from mtl_jax.balancing.ldc_mtl import ldc_mtl
from mtl_jax.balancing.mgda import mgda
from mtl_jax.balancing.moco import moco
from mtl_jax.balancing.modo import modo
from mtl_jax.balancing.moml import moml
from mtl_jax.balancing.nash_mtl import nash_mtl
from mtl_jax.balancing.ntkmtl import ntkmtl
from mtl_jax.balancing.pbi import pbi
from mtl_jax.balancing.pcd import pcd
from mtl_jax.balancing.pcgrad import pcgrad
from mtl_jax.balancing.pivrg import pivrg
from mtl_jax.balancing.random_weights import random_weights
from mtl_jax.balancing.revised_uncertainty import revised_uncertainty
from mtl_jax.balancing.scale_invariant import scale_invariant
from mtl_jax.balancing.sdmgrad import sdmgrad
from mtl_jax.balancing.stch import stch
from mtl_jax.balancing.tchebycheff import tchebycheff
from mtl_jax.balancing.trimmed_mean import trimmed_mean
from mtl_jax.balancing.uncertainty import uncertainty
from mtl_jax.balancing.upgrad import upgrad

METHODS: dict[str, Callable[..., Balancer]] = {
    # losses
    "equal": equal,
    "fixed": fixed,
    "uncertainty": uncertainty,
    "random_weights": random_weights,
    "revised_uncertainty": revised_uncertainty,
    "dwa": dwa,
    "geometric": geometric,
    "scale_invariant": scale_invariant,
    "imtl_l": imtl_l,
    "stch": stch,
    "tchebycheff": tchebycheff,
    "pbi": pbi,
    "cosmos": cosmos,
    "cov_weighting": cov_weighting,
    "famo": famo,
    "group_dro": group_dro,
    "go4align": go4align,
    "ldc_mtl": ldc_mtl,
    # gramian
    "mgda": mgda,
    "pcgrad": pcgrad,
    "gradvac": gradvac,
    "imtl_g": imtl_g,
    "imtl": imtl,
    "aligned_mtl": aligned_mtl,
    "conflict_free": conflict_free,
    "gradnorm": gradnorm,
    "ntkmtl": ntkmtl,
    "krum": krum,
    "cagrad": cagrad,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "pcd": pcd,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "pivrg": pivrg,
    # task_grads
    "graddrop": graddrop,
    "trimmed_mean": trimmed_mean,
    "moco": moco,
    "db_mtl": db_mtl,
    "excess_mtl": excess_mtl,
    # several parts of the batch, or a look-ahead
    "modo": modo,
    "sdmgrad": sdmgrad,
    "auto_lambda": auto_lambda,
    "moml": moml,
    "forum": forum,
}

__all__ = [
    "Balancer", "Decision", "METHODS", "Signals", "aggregate", "aligned_mtl", "auto_lambda",
    "cagrad", "conflict_free", "cosmos", "cov_weighting", "db_mtl", "dualproj", "dwa", "equal",
    "excess_mtl", "fairgrad", "famo", "fixed", "forum", "geometric", "get", "go4align",
    "graddrop", "gradnorm", "gradvac", "group_dro", "imtl", "imtl_g", "imtl_l", "krum",
    "ldc_mtl", "mgda", "moco", "modo", "moml", "nash_mtl", "ntkmtl", "pbi", "pcd", "pcgrad",
    "pivrg", "random_weights", "revised_uncertainty", "scale_invariant", "sdmgrad", "stch",
    "tchebycheff", "trimmed_mean", "uncertainty", "upgrad",
]


def get(name: str, **kwargs) -> Balancer:
  """The method that a config names, under the wrappers that it names.

  Args:
    name: a key of `METHODS`.
    **kwargs: the factory's own arguments, and fields of `wrappers.Options` (`every`, `smoothed`,
      `log_losses`, `max_norm`, `reduction`, `scale_heads`) that the factory has not got itself.

  Returns:
    The balancer.

  >>> get("mgda", normalization="l2", every=10).name
  'mgda'
  >>> get("kurm")  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ...
  ValueError: balancing: name: expected one of ..., found 'kurm'; nearest: krum
  """
  if name not in METHODS:
    nearest = difflib.get_close_matches(str(name), METHODS)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"balancing: name: expected one of {', '.join(sorted(METHODS))}, "
                     f"found {name!r}{hint}")
  options = {key: kwargs.pop(key) for key in wrapper_fields(name) if key in kwargs}
  return wrappers.wrap(METHODS[name](**kwargs), wrappers.Options(**options))


def wrapper_fields(name: str) -> tuple[str, ...]:
  """The wrappers that `get` lays over a method: all whose name is no argument of its factory."""
  own = inspect.signature(METHODS[name]).parameters
  return tuple(field.name for field in dataclasses.fields(wrappers.Options)
               if field.name not in own)
