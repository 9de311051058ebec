"""Eight virtual devices in every test process, so that one device and many are tested in the same one."""

import os

# Both are read when JAX starts. NPROC sizes XLA's thread pool: with fewer threads than devices need, a collective can
# starve. Small programs that run a few times: at LLVM's level 0 the tests take a third less time, and XLA's own passes
# are the same.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
    ]
)
os.environ.setdefault("NPROC", "32")

from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "topgap", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("topgap")


@pytest.fixture(scope="session")
def topgap_data() -> Path:
    """The folder of real data sets and weights; tests that need it are skipped, with this reason, where it is not at
    hand."""
    folder = os.environ.get("TOPGAP_DATA", "")
    if not folder or not Path(folder, "tfds").is_dir():
        pytest.skip("TOPGAP_DATA is not set to a folder with tfds/ and weights/")
    return Path(folder)


@pytest.fixture
def keys():
    """One key per example of a batch of four."""
    return jax.random.split(jax.random.key(0), 4)
