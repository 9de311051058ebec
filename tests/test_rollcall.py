"""Who of many processes has come, what they have in common, and what is said of one that is lost: without processes."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from topgap_jax.data import Source
from topgap_jax.errors import UserError
from topgap_jax.run import rollcall, stopping, watcher
from topgap_jax.run.stopping import stop_requests
from topgap_jax.setup import peers

FACTS = {"jax": "0.10.2", "--batch": None, "config.size": (32, 32)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rollcall, "SAY", 0.03)
    monkeypatch.setattr(rollcall, "TRY", 0.01)


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def gathered(address, count, *, present=None, facts=lambda number: FACTS, wait=20.0, then=lambda roll: None):
    """(what `meet` and `then` came to, a value or the text of its error; what was said) of processes in threads."""
    outcomes, said = {}, []

    def one(number):
        try:
            with closing(rollcall.meet(address, count, number, facts(number), wait, said.append)) as roll:
                outcomes[number] = then(roll)
        except UserError as error:
            outcomes[number] = str(error)

    threads = [threading.Thread(target=one, args=[number]) for number in (range(count) if present is None else present)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[number] for number in sorted(outcomes)], said


def test_all_come_and_agree(quick, address):
    def agreed(roll):
        roll.agree({"config.seed": 0})
        roll.agree({"digest": "0a"})
        return sorted(roll.links)

    outcomes, _ = gathered(address, 4, then=agreed)
    assert outcomes == [[1, 2, 3], [0], [0], [0]]


def test_whoever_differs_is_named_to_all(quick, address):
    mine = lambda number: FACTS | ({"jax": "0.12.0"} if number == 2 else {})
    line = (
        "process 2 differs from process 0: jax is '0.12.0' there and '0.10.2' in process 0; all of them need the same"
    )
    outcomes, _ = gathered(address, 3, facts=mine)
    assert outcomes == [line] * 3
    apart = lambda roll: roll.agree({"config.seed": 7 if roll.process == 1 else 0})
    outcomes, _ = gathered(address, 3, then=apart)
    assert (
        outcomes
        == ["process 1 differs from process 0: config.seed is 7 there and 0 in process 0; all of them need the same"]
        * 3
    )


def test_a_long_value_is_shown_where_it_differs():
    text = rollcall.difference({"config.model": "x" * 200 + "a"}, {1: {"config.model": "x" * 200 + "b"}})
    assert f"is ...{'x' * 40}b' there and ...{'x' * 40}a' in process 0" in text
    assert rollcall.difference({"a": 1}, {1: {"a": 1, "b": None}}).startswith(
        "process 1 differs from process 0: b is None there and absent in process 0"
    )


def test_who_is_missing_is_said_and_named_at_the_limit(quick, address):
    outcomes, said = gathered(address, 4, present=[0, 2], wait=0.2)
    line = "processes 1 and 3 of 4 did not come within 0.2 s; start all of them with the same command, or give more time: --wait SECONDS"
    assert outcomes == [line, line]
    assert (
        said[0].startswith("waiting for processes 1")
        and said[-1] == "waiting for processes 1 and 3 of 4, 0 of 0.2 s (--wait)"
    )
    outcomes, said = gathered(address, 4, present=[2], wait=0.2)
    assert outcomes[0].startswith(
        f"process 0 of 4 did not come to {address} within 0.2 s (Connection refused); start it"
    )
    assert said[0] == f"waiting for process 0 of 4 at {address}, 0 of 0.2 s (--wait) (Connection refused)"


def test_one_that_ends_again_is_missing_and_strangers_are_nobody(quick, address):
    def visitors():
        host, port = address.split(":")
        for text in (b"", b"GET / HTTP/1.1\r\n", b'["process"]\n', b'{"process": 1, "processes": 3, "facts": {}}\n'):
            for _ in range(200):
                try:
                    visitor = socket.create_connection((host, int(port)))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            visitor.sendall(text)
            visitor.close()

    thread = threading.Thread(target=visitors)
    thread.start()
    outcomes, _ = gathered(address, 3, present=[0], facts=lambda number: {}, wait=0.5)
    thread.join()
    assert outcomes[0].startswith("processes 1 and 2 of 3 did not come")


def test_numbers_that_do_not_fit_are_refused(quick, address):
    counts = iter([2, 3])
    outcomes = []

    def one(number, count):
        try:
            rollcall.meet(address, count, number, {}, 5.0, lambda line: None)
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one, args=[number, next(counts)]) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["process 1 was started as one of 3, process 0 as one of 2"] * 2
    outcomes, _ = gathered(address, 3, present=[0, 1, 1], wait=0.3)
    # The second of the same number is refused; both write to the same place of `outcomes`.
    assert outcomes[0].startswith("process 2 of 3 did not come")


def test_one_that_ends_before_the_first_step_is_named(quick, address):
    ends = lambda roll: roll.close() if roll.process == 1 else roll.agree({})
    outcomes, _ = gathered(address, 3, then=ends)
    line = "process 1 of 3 has ended; its own line says why"
    assert outcomes == [line, None, line]


def test_all_hear_who_is_gone(quick, address):
    """Also those who see only that process 0 ends, after it has told them."""
    barrier = threading.Barrier(4)

    def ends(roll):
        barrier.wait()
        return None if roll.process in (1, 3) else roll.gone(20.0)

    outcomes, _ = gathered(address, 4, then=ends)
    assert outcomes == [[1, 3], None, [1, 3], None]
    outcomes, _ = gathered(address, 3, then=lambda roll: roll.gone(20.0) if roll.process else None)
    assert outcomes == [None, [0], [0]]
    barrier = threading.Barrier(2)
    outcomes, _ = gathered(address, 2, then=lambda roll: (roll.gone(0.01), barrier.wait())[0])
    assert outcomes == [[], []]


def test_a_port_that_is_taken(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        outcomes, _ = gathered(address, 2, present=[0])
    assert outcomes[0].startswith("process 0 cannot listen at port ") and "Address already in use" in outcomes[0]


def test_data_that_differ_in_one_pixel_or_label_differ():
    def read(index):
        return {"image": np.full((2, 2, 3), index, np.uint8), "label": index % 3}

    source = Source("set", "train", ("a", "b", "c"), 50, read, shards=(30, 20))
    about = peers.data(source)
    assert (about["records"], about["shards"]) == (50, [30, 20]) and len(about["digest of 50 records"]) == 16
    pixel = lambda index: {**read(index), "image": read(index)["image"] + np.uint8(index == 49)}
    label = lambda index: {**read(index), "label": 0}
    for other in (pixel, label):
        assert peers.data(dataclasses.replace(source, read=other)) != about
    large = peers.data(dataclasses.replace(source, length=10**9, read=lambda index: read(index % 50)))
    assert set(large) == {"records", "shards", "digest of 64 records"}


def test_the_watcher_says_what_ended_its_process(tmp_path):
    for name in ("8", "12", "16.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / "last" / name).mkdir(parents=True)
    again = "give the same command to all of them again"
    assert watcher.last_step(tmp_path) == 12 and watcher.last_step(tmp_path / "none") == 0
    assert watcher.ended(1, 2, str(tmp_path), b"") == f"process 1 of 2 was killed; {again}: they go on from step 12"
    assert watcher.ended(0, 2, "", b"") == f"process 0 of 2 was killed; {again}"
    lost = f"topgap: process 1 of 2 ends: process 0 is gone, or does not answer; {again}: they go on from step 12\n"
    for said, line in ((b"done", b""), (b"", b"topgap: process 1 of 2 was killed; give"), (b"lost 0", lost.encode())):
        read, write = os.pipe()
        command = [sys.executable, "-I", "-S", watcher.__file__, "1", "2", str(tmp_path), str(read)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[read]) as program:
            os.close(read)
            os.write(write, b"a line\nhalf")
            errors = program.communicate(said)[1]
            os.close(write)
        assert errors.startswith(b"a line\nhalf\n" + line) and (line or errors == b"a line\nhalf\n")


def test_the_pages_of_jax_become_a_line():
    """As jaxlib 0.10.2 writes them; what it writes before goes on to the terminal."""
    head = b"F1130 02:50:19.583037   28835 client.h:80] Terminating process because the JAX distributed service detected fatal errors. "
    listed = b"absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n%s\nThe tasks have crashed. Check the task logs\n"
    leader = (
        b"absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/Heartbeat\n"
    )
    stack = b"*** Check failure stack trace: ***\n    @     0x7f3115040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n"
    early = (
        b"E1130 02:53:11.469267   30528 coordination_service.cc:1549] [65] Use error polling to propagate: "
        + listed % b"1"
    )
    for pages, line in (
        (head + listed % b"1", "process 0 of 4 ends: process 1 is gone, or does not answer; "),
        (early + b"E1130 02:53:11.469593   30545 coordination_service_agent.cc:289] Polled an error from it.\n", "process 0 of 4 ends: process 1 is gone"),
        (head + listed % b"/job:jax_worker/replica:0/task:3\n/job:jax_worker/replica:0/task:1", "process 0 of 4 ends: process 1 and process 3 are gone, or do not answer; "),
        (head + listed % b"0", "process 0 of 4 ends: it gave no sign of life for some time, and the others have ended; "),
    ):  # fmt: skip
        sieve = watcher.Sieve()
        out = b"".join(
            sieve.passed(each) for each in (b"[Gloo] Rank 0 is connected\nW a wa", b"rning\n" + pages, stack)
        )
        assert out == b"W a warning\n" and watcher.ended(0, 4, "", sieve.pages).startswith(line)
    assert watcher.ended(2, 4, "", head + leader + stack).startswith("process 2 of 4 ends: process 0 is gone")
    assert watcher.ended(2, 4, "", head + b"in other words\n").startswith(
        "process 2 of 4 ends: another process is gone"
    )


def test_many_processes_give_one_answer_some_steps_later():
    numbers = iter([0, 0, 15, 15, 15])
    answer = stopping._highest(lambda step: next(numbers))
    assert [answer(step) for step in range(5)] == [0, 0, 0, 0, 15]


def test_a_signal_that_no_step_answered_is_sent_again():
    """One that comes after the last step must not be swallowed: the evaluation after it ends too."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked(1) == signal.SIGTERM
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
