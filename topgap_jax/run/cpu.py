"""Settings that make JAX faster on a CPU, for a program to make before its first array; importing the library makes
none."""

import contextlib
import ctypes
import glob
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib

from topgap_jax import engine
from topgap_jax.build import check_number
from topgap_jax.progress import write_text
from topgap_jax.run.provenance import processor

# glibc returns large freed blocks to the system, and every step pays the page faults to get them back. One arena,
# because the pool's threads would each keep blocks that the others cannot use: without it a ResNet-20 step gains
# nothing, with it 1.2x. name of the environment variable by which a user decides instead, mallopt's parameter, value
# (-1: never trim)
MALLOC = (("MALLOC_MMAP_MAX_", -4, 0), ("MALLOC_TRIM_THRESHOLD_", -1, -1), ("MALLOC_ARENA_MAX", -8, 1))

# A collective whose threads cannot all run aborts the process after 40 s; with NPROC (XLA's thread pool) four times the
# devices no thread has to wait for another's, and the longer limit leaves room on a loaded machine.
THREADS_PER_DEVICE = 4
COUNT_FLAG = "--xla_force_host_platform_device_count"
COLLECTIVE_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"

# Without oneDNN: XLA's convolutions by Eigen and its sums by YNNPACK, not both by YNNPACK. Whether a training step is
# faster so depends on the processor: it is tried out. An unknown flag ends the process.
REDUCE_FLAG = "--xla_cpu_experimental_ynn_fusion_type=reduce"
JAXLIBS = ("0.10.", "0.12.")
TRIAL = """
import time, jax, jax.numpy as jnp
from jax import lax
def loss(w, x):
    for _ in range(3):
        x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu((x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5))
    return x.mean()
step = jax.jit(jax.grad(loss))
w, x, seconds = jnp.ones((3, 3, 32, 32)) / 9, jnp.ones((64, 16, 16, 32)), []
for _ in range(12):
    start = time.perf_counter()
    step(w, x).block_until_ready()
    seconds.append(time.perf_counter() - start)
print(min(seconds[2:]))
"""


def configure_cpu(devices: int = 1) -> str:
    """Set malloc, the compilation cache, the number of CPU devices and, without oneDNN, a flag of XLA's; returns one
    line that says so.

    Call it before the first array, since XLA reads its flags once. What the user has set wins: the variables MALLOC_*_,
    JAX_COMPILATION_CACHE_DIR (or the same in jax.config), NPROC, and any flag named in XLA_FLAGS. The cache is in
    `topgap_jax/xla` of the user's cache folder, which only the user can read. Whether the flag helps on this processor
    is measured once, in processes of their own that take some 10 s, and the verdict kept beside the cache.
    """
    check_number("devices", devices, 1, whole=True)
    done = [_keep_freed_memory(), _cache_compilations(), _add_flag(), _add_devices(devices)]
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
    folder = _cache_folder() / "xla"
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


def drop_from_cache(name: str) -> str:
    """Remove the entries of a program ("jit_step") from the compilation cache, one of which is damaged or half written;
    the cache's folder."""
    folder = jax.config.jax_compilation_cache_dir or ""
    for path in Path(folder).glob(f"{glob.escape(name)}-*-cache") if folder else ():
        with contextlib.suppress(OSError):
            path.unlink()
    return folder


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topgap_jax"


def _add_flag() -> str:
    name, given = REDUCE_FLAG.partition("=")[0], os.environ.get("XLA_FLAGS", "")
    if engine.found() or name in given or _is_file(given) or not jaxlib.__version__.startswith(JAXLIBS):
        return ""
    gain = _measured_gain()
    if gain < 1.05:
        return ""
    os.environ["XLA_FLAGS"] = f"{given} {REDUCE_FLAG}".strip()
    return f"{name}=reduce, {gain:.2f} times as fast here"


def _is_file(flags: str) -> bool:
    """XLA_FLAGS may be the name of a file with flags, to which nothing can be added."""
    return bool(flags.strip()) and not flags.lstrip().startswith("--")


def _measured_gain() -> float:
    """How many times as fast a training step is with the flag; 0 if a process with it does not end well. Kept for the
    next time."""
    path, about = _cache_folder() / "flags.json", [REDUCE_FLAG, jaxlib.__version__, processor()]
    try:
        known = json.loads(path.read_text())
        if known["about"] == about:
            return float(known["gain"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    seconds = {"": [], REDUCE_FLAG: []}
    try:
        for _ in range(2):
            for flag, found in seconds.items():
                environment = os.environ | {
                    "XLA_FLAGS": flag,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_ENABLE_COMPILATION_CACHE": "0",
                }
                call = [sys.executable, "-c", TRIAL]
                done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120, check=True)
                found.append(float(done.stdout))
        gain = min(seconds[""]) / min(seconds[REDUCE_FLAG])
    except subprocess.CalledProcessError:  # the flag, or JAX itself, ends the process
        gain = 0.0
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0  # a busy machine, say: tried again the next time
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps({"about": about, "gain": gain, "seconds": seconds}))
    except OSError:
        pass  # measured again the next time
    return gain


def _add_devices(devices: int) -> str:
    if devices == 1:
        return ""
    if _is_file(os.environ.get("XLA_FLAGS", "")):
        return "as many devices as the file in XLA_FLAGS says"
    flags = os.environ.get("XLA_FLAGS", "").split()
    for flag in (f"{COUNT_FLAG}={devices}", COLLECTIVE_FLAG):
        name = flag.partition("=")[0]
        if not any(given.partition("=")[0] == name for given in flags):
            flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY" not in os.environ:
        # Where a batch is split, the engine's calls hold an address, and with it no later process would find them in
        # the cache.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    count = next(flag.partition("=")[2] for flag in flags if flag.startswith(COUNT_FLAG))
    os.environ.setdefault("NPROC", str(max(THREADS_PER_DEVICE * int(count), os.cpu_count() or 1)))
    return f"{count} devices, NPROC={os.environ['NPROC']}"
