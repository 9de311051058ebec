"""Settings that make JAX faster on a CPU, for a program to make before its first array; importing the library makes none."""

import ctypes
import os
from pathlib import Path

import jax

from topgap_jax.build import check_number

# glibc returns large freed blocks to the system, and every step pays the page faults to get them back. One arena, because
# the pool's threads would each keep blocks that the others cannot use: without it a ResNet-20 step gains nothing, with it 1.2x.
# name of the environment variable by which a user decides instead, mallopt's parameter, value (-1: never trim)
MALLOC = (("MALLOC_MMAP_MAX_", -4, 0), ("MALLOC_TRIM_THRESHOLD_", -1, -1), ("MALLOC_ARENA_MAX", -8, 1))

# A collective whose threads cannot all run aborts the process after 40 s; with NPROC (XLA's thread pool) four times the
# devices no thread has to wait for another's, and the longer limit leaves room on a loaded machine.
THREADS_PER_DEVICE = 4
COUNT_FLAG = "--xla_force_host_platform_device_count"
COLLECTIVE_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"


def configure_cpu(devices: int = 1) -> str:
    """Set malloc, the compilation cache and the number of CPU devices; returns what was set, as one line for the log.

    Call it before the first array, since XLA reads its flags once. What the user has set wins: the variables MALLOC_*_,
    JAX_COMPILATION_CACHE_DIR (or the same in jax.config), NPROC, and any flag named in XLA_FLAGS. The cache is in
    `topgap_jax/xla` of the user's cache folder, which only the user can read.
    """
    check_number("devices", devices, 1, whole=True)
    done = [_keep_freed_memory(), _cache_compilations(), _add_devices(devices)]
    return "CPU: " + "; ".join(part for part in done if part)


def _keep_freed_memory() -> str:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return "malloc as it is"
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    set_here = [mallopt(which, value) for name, which, value in MALLOC if not (chosen or name in os.environ)]
    return "malloc keeps freed memory" if set_here and all(set_here) else "malloc as it is"


def _cache_compilations() -> str:
    if jax.config.jax_compilation_cache_dir:  # the environment variable is read into it
        return f"compilation cache {jax.config.jax_compilation_cache_dir}"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "topgap_jax" / "xla"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # compiled code is run, so nobody else may write there
    except OSError as error:
        return f"no compilation cache ({folder}: {error.strerror})"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Programs of a few milliseconds too: there are hundreds of them, and a second run should compile nothing.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return f"compilation cache {folder}"


def _add_devices(devices: int) -> str:
    if devices == 1:
        return ""
    flags = os.environ.get("XLA_FLAGS", "").split()
    for flag in (f"{COUNT_FLAG}={devices}", COLLECTIVE_FLAG):
        name = flag.partition("=")[0]
        if not any(given.partition("=")[0] == name for given in flags):
            flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY" not in os.environ:
        # Where a batch is split, the engine's calls hold an address, and with it no later process would find them in the cache.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    count = next(flag.partition("=")[2] for flag in flags if flag.startswith(COUNT_FLAG))
    os.environ.setdefault("NPROC", str(max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)))
    return f"{count} devices, NPROC={os.environ['NPROC']}"
