"""Many processes from the command line: what their arguments mean, and two of them on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    "--coordinator here:70000 --processes 2 --process 0": "--coordinator must be HOST:PORT like 10.0.0.1:1234, got 'here:70000'",
    "--coordinator here:1 --processes 0 --process 0": "--processes must be a whole number of at least 1, got 0",
    "--coordinator here:1 --processes 2 --process 2": "--process must be a whole number in [0, 1], got 2",
    "--coordinator here:1 --processes two --process 1": "argument --processes: invalid int value: 'two'; see ",
    "--distributed --process 1": "--distributed finds coordinator, processes and process itself; leave those out, or it",
    "--distributed": "--distributed: JAX does not find the other processes (no such cluster started this process); ",
    "--coordinator here:1 --processes 2 --process 1 --wait 0": "--wait must be a number of at least 1, got 0.0",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, monkeypatch):
    monkeypatch.setattr(hosts, "watch", lambda place, workdir: pytest.fail("before the words were looked at"))
    for command in (f"train --config {TINY} --workdir new", "evaluate --workdir run"):
        code, out, err = topgap(*command.split(), *words.split())
        assert (code, out) == (2, "") and err.startswith(f"topgap: {MISTAKES[words]}") and err.count("\n") == 1


def test_a_process_alone_joins_nothing():
    for line in ("evaluate --workdir run", "explain --workdir run", "compare a"):
        assert together.place(cli._parse(line.split())[0]) is None
    words = "--distributed", "--coordinator [::1]:80 --processes 3 --process 2"
    places = [together.place(cli._parse(f"evaluate --workdir run {each}".split())[0]) for each in words]
    assert places == [(None, None, None), ("[::1]:80", 3, 2)]
    assert (
        hosts.locate(*places[1]) == hosts.Place("[::1]:80", 3, 2) and hosts.Place("a:1", 3, 2).name == "process 2 of 3"
    )
    with pytest.raises(UserError, match="unknown argument '--distributed'"):
        cli._parse("explain --workdir run --distributed".split())


def started(devices, *words, where="", each=((), ()), folders=(ROOT, ROOT), come=(0, 1)):
    """Two processes with so many virtual devices each; where: "alone" for one process. each: more words of each, in
    these folders. come: those that are started at all."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    environment["PYTHONPATH"] = str(ROOT)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    numbers = [[]] if where == "alone" else [
        ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(i)] for i in (0, 1)
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "topgap_jax", *map(str, (*words, *each[i])), "--devices", str(devices), *more],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=folders[i],
        )
        for i, more in enumerate(numbers) if i in come
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


LONG = ("--no-evaluate", "--config.epochs=400", "--config.validation=")
AGAIN = "give the same command to all of them again"


def trained_to(workdir, step):
    """Wait until a run has saved so many steps."""
    until = time.monotonic() + 200
    while (checkpoint.latest_step(workdir) or 0) < step and time.monotonic() < until:
        time.sleep(0.2)


def lines(text):
    return [line for line in text.splitlines() if line.startswith("topgap:")]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_dies_or_freezes_and_both_go_on(number, victim, tmp_path):
    """The other ends in bounded time, with one line that names it; both go on with the same command."""
    processes = started(4, *train(tmp_path, *LONG))
    trained_to(tmp_path, 6)
    processes[victim].send_signal(number)
    err = processes[1 - victim].communicate(timeout=40)[1]
    stopped = checkpoint.latest_step(tmp_path)
    processes[victim].kill()
    last = processes[victim].communicate(timeout=40)[1]
    assert processes[1 - victim].returncode in (hosts.LOST, -signal.SIGABRT), err
    how = f"{AGAIN}: they go on from step {stopped}"
    assert lines(err) == [
        f"topgap: process {1 - victim} of 2 ends: process {victim} is gone, or does not answer; {how}"
    ]
    assert lines(last) == [f"topgap: process {victim} of 2 was killed; {how}"]
    assert len(err.splitlines()) < 10 and "coordination" not in err, err
    if number == signal.SIGKILL:
        processes = started(4, *train(tmp_path, *LONG))
        trained_to(tmp_path, stopped + 6)
        processes[victim].send_signal(signal.SIGTERM)
        ended(processes, [143, 143])
        steps = [row["step"] for row in read_metrics(tmp_path)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped + 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "which"), [("SIGTERM", (0,)), ("SIGTERM", (1,)), ("SIGTERM", (0, 1)), ("SIGHUP", (1,)), ("SIGINT", (0,))]
)
def test_a_signal_to_any_of_them_stops_all_at_one_step(name, which, tmp_path):
    """Saved, with one line and the code of the signal; resumed they end with the weights of a run without a stop."""
    words = ("--no-evaluate", "--config.epochs=30", "--config.validation=")
    processes = started(4, *train(tmp_path / "two", *words))
    trained_to(tmp_path / "two", 6)
    number = getattr(signal, name)
    for each in which:
        processes[each].send_signal(number)
    (_, err), (_, others) = ended(processes, [128 + number] * 2)
    step = checkpoint.latest_step(tmp_path / "two")
    assert lines(err)[-1] == f"topgap: stopped and saved at step {step} of 90; to go on, give the same command again"
    assert lines(others) == []
    if which == (0, 1):
        ended(started(4, *train(tmp_path / "two", *words)), [0, 0])
        ended(started(4, *train(tmp_path / "whole", *words)), [0, 0])
        for resumed, whole in zip(numbers(tmp_path / "two"), numbers(tmp_path / "whole"), strict=True):
            np.testing.assert_array_equal(resumed, whole)


@pytest.mark.slow
def test_an_evaluation_ends_by_a_signal(alone):
    words = ("evaluate", "--workdir", alone[0], "--evaluators", "robust(pgd(linf(eps), steps=100000))", "--batch", "8")
    processes = started(4, *words)
    for line in processes[0].stderr:
        if line.startswith("reading shapes() test"):
            break
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for number, (_, err) in enumerate(ended(processes, [143, 143])):
        assert lines(err) == [f"topgap: process {number}: stopped by SIGTERM"]


@pytest.mark.slow
def test_who_never_comes_is_named():
    for here, line in ((0, "process 1 of 2 did not come within 2 s"), (1, "process 0 of 2 did not come to localhost:")):
        ((out, err),) = ended(started(1, *train("nowhere"), "--wait", "2", come=[here]), [2])
        assert out == "" and err.startswith(f"topgap: process {here}: {line}") and err.count("\n") == 1


def differing(kind, tmp_path):
    """(words of both, more words of each, folder of each, what is said) where process 1 does something else."""
    config, other = Path(TINY).read_text(), tmp_path / "other.py"
    words = ("train", "--workdir", tmp_path / "run", "--config.batch=16")
    tiny = ("--config", TINY)
    if kind == "words":
        return (
            words,
            (tiny, (*tiny, "--config.seed=1")),
            (ROOT, ROOT),
            "--config.seed is '1' there and absent in process 0",
        )
    if kind == "config":
        other.write_text(config.replace("config.epochs = 2", "config.epochs = 3"))
        return words, (tiny, ("--config", other)), (ROOT, ROOT), "config.epochs is 3 there and 2 in process 0"
    folders = []
    for number in (0, 1):
        folders.append(tmp_path / str(number))
        for name in ("a", "b"):
            (folders[-1] / "data" / "train" / name).mkdir(parents=True)
            for index in range(20):
                image = np.full((32, 32, 3), index + 100 * (name == "b") + (number and index == 7), np.uint8)
                Image.fromarray(image).save(folders[-1] / "data" / "train" / name / f"{index}.png")
    words += (*tiny, "--config.source=folder('data')", "--config.validation=", "--config.test=")
    return words, ((), ()), folders, "folder('data') split 'train', digest of 40 records is "


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "config", "data"])
def test_whoever_does_something_else_is_named_before_the_first_step(kind, tmp_path):
    words, each, folders, line = differing(kind, tmp_path)
    for number, (out, err) in enumerate(ended(started(1, *words, each=each, folders=folders), [2, 2])):
        said = lines(err)[-1]
        assert said.startswith(f"topgap: process {number}: process 1 differs from process 0: {line}"), err
        assert said.endswith("; all of them need the same") and "Traceback" not in err and out == ""
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
