"""Many processes from the command line: what their arguments mean, and two of them on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.test_cli import ROOT, TINY, topgap
from tests.tiny_fit import flat
from topgap_jax import cli, setup
from topgap_jax.cli import together
from topgap_jax.errors import UserError
from topgap_jax.progress import read_metrics
from topgap_jax.run import checkpoint, hosts

MISTAKES = {
    "--coordinator here:1": "--processes N and --process I missing: --coordinator HOST:PORT, --processes N, --process I go",
    "--processes 2": "--coordinator HOST:PORT and --process I missing: ",
    "--coordinator here --processes 2 --process 0": "--coordinator must be HOST:PORT like 10.0.0.1:1234, got 'here'",
    "--coordinator here:1 --processes 0 --process 0": "--processes must be a whole number of at least 1, got 0",
    "--coordinator here:1 --processes 2 --process 2": "--process must be a whole number in [0, 1], got 2",
    "--coordinator here:1 --processes two --process 1": "argument --processes: invalid int value: 'two'; see ",
    "--distributed --process 1": "--distributed finds coordinator, processes and process itself; leave those out, or it",
    "--distributed": "--distributed: JAX does not find the other processes (",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, monkeypatch):
    def nothing_found(*numbers, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", nothing_found)
    monkeypatch.setattr(cli.commands, "_configured", lambda devices, place: hosts.join(*place))
    for command in (f"train --config {TINY} --workdir new", "evaluate --workdir run"):
        code, out, err = topgap(*command.split(), *words.split())
        assert (code, out) == (2, "") and err.startswith(f"topgap: {MISTAKES[words]}") and err.count("\n") == 1


def test_a_process_alone_joins_nothing():
    for line in ("evaluate --workdir run", "explain --workdir run", "compare a"):
        assert together.place(cli._parse(line.split())[0]) is None
    words = "--distributed", "--coordinator [::1]:80 --processes 3 --process 2"
    places = [together.place(cli._parse(f"evaluate --workdir run {each}".split())[0]) for each in words]
    assert places == [(None, None, None), ("[::1]:80", 3, 2)]
    hosts._check(*places[1])
    with pytest.raises(UserError, match="unknown argument '--distributed'"):
        cli._parse("explain --workdir run --distributed".split())


def started(devices, *words, where=""):
    """Two processes with so many virtual devices each; where: "alone" for one process."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    numbers = [[]] if where == "alone" else [
        ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(i)] for i in (0, 1)
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "topgap_jax", *map(str, words), "--devices", str(devices), *more],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT,
        )
        for more in numbers
    ]  # fmt: skip


def ended(processes, codes):
    """What they print, once all have ended with these statuses."""
    try:
        texts = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == codes, texts
    return texts


def train(workdir, *more):
    return ("train", "--config", TINY, "--workdir", workdir, "--config.batch=16", *more)


FIVE = ("--config.train=train[:32]", "--config.epochs=3", "--config.evaluators=accuracy()")  # six steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((out, _),) = ended(started(8, *train(workdir, *FIVE), where="alone"), [0])
    return workdir, out


def numbers(workdir):
    return flat(setup.from_workdir(workdir, checkpoint_name="last").variables)


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(alone, tmp_path):
    (out, err), (silent, others) = ended(started(4, *train(tmp_path / "two", *FIVE)), [0, 0])
    assert "test: accuracy()" in out and silent == ""
    assert "training" in err and "topgap" not in others and "training" not in others
    np.testing.assert_allclose(numbers(tmp_path / "two"), numbers(alone[0]), rtol=1e-4, atol=1e-5)
    rows = [
        [(row["kind"], row["step"], row["loss"]) for row in read_metrics(each)] for each in (tmp_path / "two", alone[0])
    ]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]] and len(rows[0]) == 6 + 3
    np.testing.assert_allclose([row[2] for row in rows[0]], [row[2] for row in rows[1]], rtol=1e-4)
    assert json.loads((tmp_path / "two" / "versions.json").read_text())["processes"] == 2
    words = (
        "evaluate",
        "--workdir",
        tmp_path / "two",
        "--evaluators",
        "accuracy(), robust(pgd(linf(eps), steps=2))",
        "--batch",
        "8",
    )
    (out, _), (silent, _) = ended(started(4, *words), [0, 0])
    assert "accuracy under pgd-2" in out and silent == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_both_go_on(victim, tmp_path):
    """The other ends in bounded time, with a line; then both go on with the command that they were given."""
    more = ("--no-evaluate", "--config.epochs=400", "--config.validation=")
    processes = started(4, *train(tmp_path, *more))
    until = time.monotonic() + 200
    while (checkpoint.latest_step(tmp_path) or 0) < 6 and time.monotonic() < until:
        time.sleep(0.2)
    processes[victim].kill()
    texts = [process.communicate(timeout=200)[1] for process in processes]
    again = "give the same command to all of them again: they go on from the last checkpoint\n"
    assert processes[victim].returncode == -signal.SIGKILL
    assert processes[1 - victim].returncode in (3, -signal.SIGABRT), texts
    for number, text in enumerate(texts):
        assert f"topgap: process {number} of 2" in text and again in text, text  # JAX may add pages of its own
    stopped = checkpoint.latest_step(tmp_path)
    assert stopped >= 6
    processes = started(4, *train(tmp_path, *more))
    while checkpoint.latest_step(tmp_path) < stopped + 6 and time.monotonic() < until + 200:
        time.sleep(0.2)
    processes[victim].send_signal(signal.SIGTERM)  # either one stops both
    texts = ended(processes, [143, 143])
    assert "topgap: stopped and saved at step " in texts[0][1] and "topgap" not in texts[1][1]
    assert checkpoint.latest_step(tmp_path) >= stopped + 6
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
