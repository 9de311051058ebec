"""One device, eight, two processes: the same training; what `configure_cpu` sets, and that a user's own settings
win."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests import tiny_fit
from tests.tiny_fit import CONFIG, flat, parts
from topgap_jax.errors import UserError
from topgap_jax.mesh import check_batch, data_mesh, replicated, split
from topgap_jax.progress import read_metrics
from topgap_jax.run import checkpoint
from topgap_jax.run.fit import fit


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """An uninterrupted run on eight devices: (folder, all its numbers)."""
    workdir = tmp_path_factory.mktemp("eight")
    return workdir, flat(fit(CONFIG, workdir, parts()))


def test_the_mesh_has_one_auto_axis():
    mesh = data_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == 8 and mesh.axis_types == (AxisType.Auto,)
    values = jax.device_put(np.arange(16), split(mesh))
    assert [shard.data.shape for shard in values.addressable_shards] == [(2,)] * 8
    assert jax.device_put(np.arange(16), replicated(mesh)).is_fully_replicated


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (100, "batch=100 cannot be split evenly over 8 devices; take 96 or 104"),
        (4, "batch=4 cannot be split evenly over 8 devices; take 8"),
        (0, "batch=0 cannot be split evenly over 8 devices; take 8"),
    ],
)
def test_a_batch_that_the_devices_do_not_divide(batch, text, tmp_path):
    with pytest.raises(UserError) as error:
        check_batch(batch, data_mesh())
    assert str(error.value) == text
    with pytest.raises(UserError, match="cannot be split evenly"):
        fit(CONFIG, tmp_path / "run", parts(batch=batch))
    assert not (tmp_path / "run").exists()


def test_eight_devices_agree_with_one(eight, tmp_path):
    one = fit(CONFIG, tmp_path, parts(), mesh=data_mesh(jax.devices()[:1]))
    np.testing.assert_allclose(flat(one), eight[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_on_eight_devices_goes_on_to_the_same_bits(eight, tmp_path):
    workdir, expected = eight
    done = tiny(tmp_path, "kill_at=12")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.latest_step(tmp_path) == 10
    np.testing.assert_array_equal(flat(fit(CONFIG, tmp_path, parts())), expected)
    assert read_metrics(tmp_path) == read_metrics(workdir)


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_devices(eight, tmp_path):
    done = tiny(tmp_path, "kill_at=8")
    assert done.returncode == -signal.SIGKILL, done.stderr
    two = fit(CONFIG, tmp_path, parts(), mesh=data_mesh(jax.devices()[:2]))
    np.testing.assert_allclose(flat(two), eight[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save(eight, tmp_path):
    _, expected = eight
    for step in range(4, 7):  # the checkpoint of step 5 among them
        process = subprocess.Popen(
            command(tmp_path, f"kill_at={step}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        folder = tmp_path / "checkpoints" / "last"
        while process.poll() is None:
            if folder.is_dir() and any("tmp" in path.name for path in folder.iterdir()):
                process.kill()
        process.wait()
    np.testing.assert_array_equal(flat(fit(CONFIG, tmp_path, parts())), expected)


@pytest.mark.slow
def test_two_processes_of_four_devices_agree_with_one_of_eight(eight, tmp_path):
    workdir, expected = eight
    together(tmp_path / "run", tmp_path)
    for process in (0, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"{process}.npy"), expected, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # process 0 only
    rows = [(row["kind"], row["step"]) for row in read_metrics(tmp_path / "run")]
    assert rows == [(row["kind"], row["step"]) for row in read_metrics(workdir)]
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both(eight, tmp_path):
    texts = together(tmp_path / "run", tmp_path, "stop_at=7", expected=143)
    assert texts[0] == texts[1] and texts[0].startswith("stopped and saved at step ")
    together(tmp_path / "run", tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "0.npy"), eight[1], rtol=1e-4, atol=1e-5)


def command(workdir, *options):
    return [sys.executable, tiny_fit.__file__, str(workdir), *options]


def tiny(workdir, *options):
    return subprocess.run(command(workdir, *options), capture_output=True, text=True, timeout=300)


def together(workdir, out, first=(), expected=0):
    """Two processes of four devices each; `first`: an option for process 0 alone. Returns what they print."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    options = [[f"port={port}", f"process={number}", f"out={out}/{number}.npy"] for number in (0, 1)]
    options[0] += [first] if first else []
    processes = [
        subprocess.Popen(
            command(workdir, *some),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        for some in options
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [expected] * 2, outputs
    # Gloo prints lines of its own before.
    return [output.splitlines()[-1] if output else "" for output, _ in outputs]


CONFIGURED = """
import json, os, sys
import topgap_jax.run.cpu
before = dict(os.environ)
import jax
untouched = jax.config.jax_compilation_cache_dir
line = topgap_jax.run.cpu.configure_cpu(int(sys.argv[1]))
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
float(jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))).sum())
print(json.dumps([line, changed, untouched, jax.config.jax_compilation_cache_dir, jax.device_count()]))
"""


def configured(home, devices, **environment):
    """(log line, changed variables, cache before, cache after, devices) of a fresh process that calls configure_cpu."""
    dropped = ("XLA_FLAGS", "NPROC", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    clean = {
        name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURED, str(devices)],
        capture_output=True, text=True, timeout=300, env={**clean, "HOME": str(home), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_configure_cpu_keeps_memory_and_compilations_in_a_private_folder(tmp_path):
    line, changed, before, cache, devices = configured(tmp_path, 1)
    assert cache == f"{tmp_path}/.cache/topgap_jax/xla" and before is None
    assert (devices, changed) == (1, {})
    if sys.platform == "linux":
        assert line == f"CPU: malloc keeps freed memory; compilation cache {cache}"
    assert stat.S_IMODE(os.stat(cache).st_mode) == 0o700
    files = {path.name for path in (tmp_path / ".cache" / "topgap_jax" / "xla").iterdir()}
    assert any(name.startswith("jit") for name in files)


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    files = []
    for _ in range(2):
        configured(tmp_path, 1)
        files.append({path.name for path in (tmp_path / ".cache" / "topgap_jax" / "xla").iterdir()})
    assert files[0] == files[1]


def test_configure_cpu_gives_devices_with_threads_enough(tmp_path):
    line, changed, _, _, devices = configured(tmp_path, 2)
    threads = str(max(8, os.cpu_count()))
    assert devices == 2 and line.endswith(f"; 2 devices, NPROC={threads}")
    flags = "--xla_force_host_platform_device_count=2 --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    assert changed == {"XLA_FLAGS": flags, "NPROC": threads}


def test_what_the_user_set_wins(tmp_path):
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=99 --xla_force_host_platform_device_count=3"
    given = {"XLA_FLAGS": flags, "NPROC": "13", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    given |= {"MALLOC_MMAP_MAX_": "5", "MALLOC_TRIM_THRESHOLD_": "7", "MALLOC_ARENA_MAX": "3"}
    line, changed, _, cache, devices = configured(tmp_path, 2, **given)
    assert (changed, devices, cache) == ({}, 3, str(tmp_path / "own"))
    assert line == f"CPU: malloc as it is; compilation cache {cache}; 3 devices, NPROC=13"
    assert not (tmp_path / ".cache" / "topgap_jax").exists()


@pytest.mark.slow
def test_no_cache_where_none_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    line, _, _, cache, _ = configured(tmp_path, 1, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert cache is None
    assert f"no compilation cache ({tmp_path}/file/topgap_jax/xla: Not a directory)" in line


def test_devices_must_be_a_number():
    from topgap_jax.run.cpu import configure_cpu

    with pytest.raises(UserError, match="devices must be a whole number of at least 1, got 0"):
        configure_cpu(0)
