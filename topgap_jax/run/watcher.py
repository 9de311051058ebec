"""A small program beside each of many processes. It says what ended that process where nothing in it can: killed, or
ended by JAX, in C, when another process is gone. It needs nothing but Python, and starts at once.

    python watcher.py PROCESS PROCESSES WORKDIR DESCRIPTOR

What C++ writes as errors comes to it through the pipe DESCRIPTOR and goes on to the terminal, but for the pages that
JAX's coordination service writes of a lost process: a line says what they mean. Its standard input ends with the
process, or says "done" before.
"""

import os
import re
import select
import signal
import sys

DONE = b"done"
GLOG = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ ([\w./-]+):\d+\] ")  # "E1130 10:15:00.123456    4711 file.cc:77] "
SERVICE = re.compile(rb"coordination|distributed/client|preemption|grpc|tsl/")  # files of XLA whose lines are held
SILENT = re.compile(rb"/task:(\d+)")
LEADER = re.compile(rb"leader task was preempted|Leader incarnation|UNAVAILABLE")
AGAIN = "give the same command to all of them again"
EVERY = 0.2  # seconds between two looks at whether the process is there


class Sieve:
    """Lines that pass at once, and those of JAX's coordination service, which are held."""

    def __init__(self):
        self.rest, self.held, self.holds = b"", b"", False

    def passed(self, data: bytes) -> bytes:
        """What of all lines that `data` completes goes on to the terminal. A line without a head of its own belongs to
        the one before it."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        out = b""
        for line in lines:
            if head := GLOG.match(line):
                self.holds = bool(SERVICE.search(head[1]))
            if self.holds:
                self.held += line + b"\n"
            else:
                out += line + b"\n"
        return out


def last_step(workdir: str) -> int:
    """The newest step that a run can go on from, 0 if there is none."""
    try:
        names = os.listdir(os.path.join(workdir, "checkpoints", "last"))
    except OSError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def how_to_go_on(workdir: str) -> str:
    """workdir: "" of a command that saves nothing to go on from."""
    if not workdir:
        return AGAIN
    step = last_step(workdir)
    return f"{AGAIN}: they go on from step {step}" if step else f"{AGAIN}: no step is saved yet, they begin anew"


def silent(text: bytes, process: int) -> list[int]:
    """The processes that JAX's service says to be gone; [] where it names none."""
    tasks = sorted({int(number) for number in SILENT.findall(text)} - {process})
    return tasks or [0] * bool(process and LEADER.search(text))


def lost(process: int, processes: int, numbers: list[int], workdir: str) -> str:
    """The line of a process that ends because those of these numbers are gone."""
    who = " and ".join(f"process {number}" for number in numbers) or "another process"
    return f"process {process} of {processes} ends: {who} is gone, or does not answer; {how_to_go_on(workdir)}"


def ended(process: int, processes: int, workdir: str, text: bytes) -> str:
    """The line about a process that is no more, in which JAX's service wrote `text`."""
    if text:
        return lost(process, processes, silent(text, process), workdir)
    return f"process {process} of {processes} was killed; {how_to_go_on(workdir)}"


def main(process: int, processes: int, workdir: str, descriptor: int) -> None:
    parent = os.getppid()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they are the process's own, which says "done" if it ends by them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sieve, done, pipes = Sieve(), False, [descriptor, 0]
    while not done and 0 in pipes and os.getppid() == parent:
        for pipe in select.select(pipes, [], [], EVERY)[0]:
            data = os.read(pipe, 2**16)
            if not data:
                pipes.remove(pipe)
            elif pipe == descriptor:
                os.write(2, sieve.passed(data))
            else:
                done = data.startswith(DONE)
    while descriptor in pipes and select.select([descriptor], [], [], 0)[0]:
        data = os.read(descriptor, 2**16)
        os.write(2, sieve.passed(data))
        if not data:
            break
    os.write(2, sieve.passed(b"\n") if sieve.rest else b"")
    if not done:
        os.write(2, f"topgap: {ended(process, processes, workdir, sieve.held)}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
