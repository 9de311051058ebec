"""A small program beside each of many processes. It says what ended that process where nothing in it can: killed, or
ended by JAX, in C, when another process is gone. It needs nothing but Python, and starts at once.

    python watcher.py PROCESS PROCESSES WORKDIR DESCRIPTOR

What C++ writes as errors comes to it through the pipe DESCRIPTOR and goes on to the terminal, but for the pages that
JAX's distributed service writes when it ends the process: a line says what they mean. Its standard input ends with the
process, or says before that it is "done", or "lost" the processes of these numbers.
"""

import os
import re
import select
import signal
import sys

DONE, LOST = b"done", b"lost"
PAGES = re.compile(rb"[EF]\d{4} .*(JAX distributed |coordination.)service")  # their first line
LISTED = re.compile(rb"unhealthy.*:\n((?:.*\d\n)+)")  # those that are gone, one a line: a number, or .../task:NUMBER
CALL = re.compile(rb"RPC.*[cC]oordination.?[sS]ervice")
CHATTER = b"[Gloo] Rank "  # says several times a start that all are connected
AGAIN = "give the same command to all of them again"
EVERY = 0.2  # seconds between two looks at whether the process is there


class Sieve:
    """What C++ writes: lines that go on to the terminal, and `pages`, those of JAX from their first line on."""

    def __init__(self):
        self.rest, self.pages = b"", b""

    def passed(self, data: bytes) -> bytes:
        """What of all lines that `data` completes goes on."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        out = b""
        for line in lines:
            if self.pages or PAGES.search(line):
                self.pages += line + b"\n"
            elif not line.startswith(CHATTER):
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


def lost(process: int, processes: int, numbers: list[int], workdir: str) -> str:
    """The line of a process that ends because those of these numbers are gone; [] where they are not known."""
    who = " and ".join(f"process {number}" for number in numbers) or "another process"
    verb = "are gone, or do not answer" if len(numbers) > 1 else "is gone, or does not answer"
    return f"process {process} of {processes} ends: {who} {verb}; {how_to_go_on(workdir)}"


def ended(process: int, processes: int, workdir: str, pages: bytes) -> str:
    """The line about a process that is no more, in which JAX's service wrote `pages`."""
    if not pages:
        return f"process {process} of {processes} was killed; {how_to_go_on(workdir)}"
    if listed := LISTED.search(pages):
        numbers = sorted(int(re.findall(rb"\d+", line)[-1]) for line in listed[1].splitlines())
    else:  # the service itself, which is in process 0, did not answer a call
        numbers = [0] * bool(process and CALL.search(pages))
    if numbers == [process]:
        why = "it gave no sign of life for some time, and the others have ended"
        return f"process {process} of {processes} ends: {why}; {how_to_go_on(workdir)}"
    return lost(process, processes, [number for number in numbers if number != process], workdir)


def main(process: int, processes: int, workdir: str, descriptor: int) -> None:
    parent = os.getppid()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they are the process's own, which says "done" if it ends by them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sieve, message, pipes = Sieve(), b"", [descriptor, 0]

    def read(seconds):
        nonlocal message
        ready = select.select(pipes, [], [], seconds)[0]
        for pipe in ready:
            data = os.read(pipe, 2**16)
            if not data:
                pipes.remove(pipe)
            elif pipe == descriptor:
                os.write(2, sieve.passed(data))
            else:
                message = data
        return ready

    while not message and 0 in pipes and os.getppid() == parent:
        read(EVERY)
    while read(0):  # what it left
        pass
    os.write(2, sieve.passed(b"\n") if sieve.rest else b"")
    if message == DONE:
        return
    gone = [int(number) for number in message.removeprefix(LOST).split()]
    line = lost(process, processes, gone, workdir) if gone else ended(process, processes, workdir, sieve.pages)
    os.write(2, f"topgap: {line}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
