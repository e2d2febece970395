"""Eight fake CPU devices and a strict jax, set before anything imports jax."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"  # threads for the fake devices' all-reduces: fewer can starve and abort
# Programs run less often here than they are compiled; flags of the environment come later and win.
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1", os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8"])

# One compilation a program, however many runs of it a session starts; launches inherit this.
_cache = tempfile.TemporaryDirectory(prefix="mtl_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
