"""Where arrays live: jit over a mesh of all devices, with explicit shardings and donated state.

Parameters and everything else that moves are replicated, batches are split along their first axis;
XLA inserts the reductions, so that losses, BatchNorm statistics and task gradients are those of the
whole batch whatever the number of devices. What these functions compile is a program of its own: it
has options for its devices, so that JAX lets no other jit contain it.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Of the library YNNPACK matrix products and sums only: its convolutions take one core.
_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type":
           "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh with one axis, "data", over the given devices, or over all."""
  devices = jax.devices() if devices is None else devices
  # make_mesh's default axis type is Explicit, under which per-task gradients do not trace.
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  """The first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def check_divides(batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError where a batch cannot be split evenly, naming the nearest sizes that can."""
  n = mesh.size
  if batch_size < 1 or batch_size % n:
    below, above = batch_size // n * n, (batch_size // n + 1) * n
    nearest = f"{below} or {above}" if below > 0 else f"{above}"
    raise ValueError(f"batch_size: expected a multiple of the {n} devices, found {batch_size}; "
                     f"the nearest is {nearest}")


def _compile(function: Callable, mesh: Mesh, **how: Any) -> Callable:
  """`jax.jit` with what is fast on the mesh's devices."""
  return jax.jit(function, compiler_options=_options(mesh.devices.flat[0].platform), **how)


@functools.cache
def _options(platform: str) -> dict[str, str] | None:
  """Options of XLA's for a platform, or None for its own choice."""
  if platform != "cpu":
    return None
  try:
    jax.jit(lambda: 0, compiler_options=_ON_CPU).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "INVALID_ARGUMENT" not in str(error):
      raise
    return None  # an XLA without this option
  return _ON_CPU


def create_sharded(create: Callable[[], Any], mesh: Mesh) -> Any:
  """Runs `create()` under jit, its results created where they will live."""
  # It runs once: on CPUs, XLA's full effort takes seconds to save milliseconds.
  quickly = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return jax.jit(create, out_shardings=replicated(mesh),
                 compiler_options=quickly if on_cpu else None)()


def sharded_step(step: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh) -> Callable:
  """Compiles `step(state, batch) -> (state, logs)`: state replicated and donated, batch split."""
  everywhere, along_batch = replicated(mesh), split(mesh)
  return _compile(step, mesh, in_shardings=(everywhere, along_batch), out_shardings=everywhere,
                  donate_argnums=0)


def sharded_resident_steps(step: Callable[[Any, Any], tuple[Any, Any]],
                           batch_at: Callable[[Any, Any], Any], mesh: Mesh,
                           num_steps: int) -> Callable:
  """Compiles `num_steps` steps over resident data: `run(state, data) -> (state, logs)`.

  Args:
    step: `step(state, batch) -> (state, logs)`.
    batch_at: `batch_at(data, state) -> batch`, drawn from the data inside the program.
    mesh: of the devices; state and data are replicated, the drawn batch is split.
    num_steps: logs come back with this leading axis.
  """
  everywhere = replicated(mesh)
  return _compile(_several(step, batch_at, mesh, num_steps), mesh,
                  in_shardings=(everywhere, everywhere), out_shardings=everywhere,
                  donate_argnums=0)


def _several(step: Callable[[Any, Any], tuple[Any, Any]],
             batch_at: Callable[[Any, Any], Any], mesh: Mesh,
             num_steps: int) -> Callable[[Any, Any], tuple[Any, Any]]:
  """`num_steps` steps, each on a batch of its own: `run(state, data) -> (state, logs)`."""
  def one(state, data):
    batch = batch_at(data, state)
    return step(state, jax.lax.with_sharding_constraint(batch, split(mesh)))

  def several(state, data):
    if num_steps == 1:  # Plain linen convolutions are slow in loops on CPUs.
      state, logs = one(state, data)
      return state, jax.tree.map(lambda x: x[None], logs)
    return jax.lax.scan(lambda s, _: one(s, data), state, None, length=num_steps)
  return several


def sharded_seeds_steps(step: Callable[[Any, Any], tuple[Any, Any]],
                        batch_at: Callable[[Any, Any], Any], mesh: Mesh,
                        num_steps: int) -> Callable:
  """Compiles `num_steps` steps of several seeds at once, vectorized over a leading axis of seeds.

  Args:
    step: of one seed, `step(state, batch) -> (state, logs)`.
    batch_at: of one seed, `batch_at((shared, own), state) -> batch`.
    mesh: of the devices; states and data are replicated, every seed's batch is split.
    num_steps: logs come back with this leading axis.

  Returns:
    `run(states, shared, own) -> (states, logs)`, all but the data that the seeds share one a seed,
    in a list. The states are given away; they must be at one step.
  """
  several = _several(step, batch_at, mesh, num_steps)

  def together(states, shared, own):
    # The step has no axis of seeds, so that what is done every so many steps stays a branch.
    stacked, own = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
                    for trees in ([state.replace(step=None) for state in states], own))
    axes = jax.tree.map(lambda _: 0, stacked)
    state, logs = jax.vmap(
        lambda state, own: several(state, (shared, own)), in_axes=(axes, 0), out_axes=(axes, 0))(
            stacked.replace(step=states[0].step), own)
    apart = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(states))]
    return [one.replace(step=state.step) for one in apart(state.replace(step=None))], apart(logs)

  everywhere = replicated(mesh)
  return _compile(together, mesh, in_shardings=everywhere, out_shardings=everywhere,
                  donate_argnums=0)


def sharded_eval(evaluate: Callable[[Any, Any, Any], Any], mesh: Mesh) -> Callable:
  """Compiles `evaluate(state, batch, constants) -> metric states`; only the batch is split."""
  everywhere = replicated(mesh)
  return _compile(evaluate, mesh, in_shardings=(everywhere, split(mesh), everywhere),
                  out_shardings=everywhere)
