"""Eight fake CPU devices and a strict jax, set before anything imports jax."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"  # threads for the fake devices' all-reduces: fewer can starve and abort
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# One compilation a program, however many runs of it a session starts.
_cache = tempfile.TemporaryDirectory(prefix="mtl_jax_compiled_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
