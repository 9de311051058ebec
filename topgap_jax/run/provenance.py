"""What a result was made with: command, commit, versions and hardware, for `versions.json` and `results/*.json`."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from topgap_jax import engine

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def provenance() -> dict[str, Any]:
    """{"command", "commit", "versions", "convolutions", "threefry_partitionable", "device", "device_count",
    "processor", "cores", "load_average"} of this process; the command as a shell takes it."""
    return {
        # The last part of an absolute path only: whose machine it was is nobody's business.
        "command": shlex.join(Path(word).name if word.startswith("/") else word for word in sys.argv),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "convolutions": engine.status() if jax.default_backend() == "cpu" else None,
        "threefry_partitionable": bool(jax.config.jax_threefry_partitionable),  # other numbers from the same keys
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _commit() -> str | None:
    """The commit of the folder that the program is run in, with "+" if files other than results differ from it."""
    try:
        call = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        head = call("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return None
        changed = call("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results")
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
