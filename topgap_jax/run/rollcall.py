"""Who of many processes has come, and whether they are about to do the same: asked before JAX joins them, since JAX
waits in silence and names nobody.

Process 0 listens at the coordinator's address, which JAX's own service takes once all are there; the others connect to
it. The connections stay open until the first step: over them process 0 compares what each says of itself, and one that
ends earlier is known by name. Messages are lines of JSON.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import wait as wait_for  # a poll, where select knows 1,024 files
from typing import Any, NoReturn

from topgap_jax.errors import UserError

SAY = 15  # seconds between two lines that say who is missing
TRY = 0.5  # seconds between two tries to reach process 0
SETTLE = 0.1  # seconds between the first end that is seen and the look at who else has ended
ANSWER = 30  # seconds that the others give process 0 beyond the limit, to say itself who is missing
LARGEST = 2**20  # bytes of a message; whoever sends more is none of ours
Facts = Mapping[str, Any]
"""What must be the same in every process, under the names by which a user knows it."""


class Gone(Exception):
    """The other end of a link has ended."""


class Link:
    """A connection over which messages go both ways."""

    def __init__(self, connection: socket.socket):
        self.socket, self.rest = connection, b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise Gone from None

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, None if none came in so many seconds; raises Gone."""
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = None if until is None else max(0, until - time.monotonic())
            if not wait_for([self], left):
                return None
            try:
                data = self.socket.recv(2**16)
            except OSError:
                data = b""
            if not data or len(self.rest) > LARGEST:
                raise Gone
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise Gone from None
        if not isinstance(message, dict):
            raise Gone
        return message

    def close(self) -> None:
        self.socket.close()


class Roll:
    """All processes of a run, once they have come: `links` to the others, of process 0; to process 0, of the others."""

    def __init__(self, process: int, processes: int, links: Mapping[int, Link]):
        self.process, self.processes, self.links = process, processes, links

    def agree(self, facts: Facts) -> None:
        """Compare facts of all processes; every one must call this. Raises the same UserError in all of them, which
        names the process that differs, what differs, and both values."""
        if self.process:
            try:
                self.links[0].send({"facts": facts})
                answer = self.links[0].receive()
            except Gone:
                raise UserError(f"process 0 of {self.processes} has ended; its own line says why") from None
            if answer.get("refused"):
                raise UserError(answer["refused"])
            return
        refused, facts_of = "", {}
        for number, link in self.links.items():
            try:
                facts_of[number] = link.receive()["facts"]
            except Gone:
                refused = refused or f"process {number} of {self.processes} has ended; its own line says why"
        refused = refused or difference(facts, facts_of)
        _tell(self.links.values(), {"refused": refused})
        if refused:
            raise UserError(refused)

    def gone(self, seconds: float) -> list[int]:
        """The processes that have ended, once there are any, within so many seconds. The others hear it from process 0,
        whose end they would take for the cause."""
        if self.process:
            try:
                return (self.links[0].receive(seconds) or {}).get("gone", [])
            except Gone:
                return [0]
        wait_for([*self.links.values()], seconds)
        time.sleep(SETTLE)
        numbers = []
        for number, link in self.links.items():
            try:
                link.receive(0)
            except Gone:
                numbers.append(number)
        if numbers:
            _tell(self.links.values(), {"gone": numbers})
        return numbers

    def close(self) -> None:
        for link in self.links.values():
            link.close()


def meet(coordinator: str, processes: int, process: int, facts: Facts, wait: float, say: Callable[[str], None]) -> Roll:
    """Wait until all processes have come to `coordinator` ("host:port"), at most `wait` seconds.

    say: is given a line every 15 seconds that names who is missing. Raises UserError, in all that have come, where some
    never do, or where facts differ.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if process:
        return Roll(process, processes, {0: _come(host, int(port), processes, process, facts, wait, say)})
    links: dict[int, Link] = {}
    strangers: list[Link] = []  # connections that have not said yet which process they are
    with _listener(int(port)) as listener:
        try:
            _gather(listener, links, strangers, processes, facts, wait, say)
        except BaseException:
            strangers += links.values()
            raise
        finally:
            for stranger in strangers:
                stranger.close()
    return Roll(0, processes, dict(sorted(links.items())))


def difference(facts: Facts, others: Mapping[int, Facts]) -> str:
    """The first way in which another process differs from process 0, whose facts come first; "" if none does.

    >>> difference({"config.seed": 0}, {1: {"config.seed": 0}, 2: {"config.seed": 7}})
    'process 2 differs from process 0: config.seed is 7 there and 0 in process 0; all of them need the same'
    """
    facts = json.loads(json.dumps(facts))  # as those of the others come
    for number, theirs in sorted(others.items()):
        for key in dict.fromkeys((*facts, *theirs)):
            here, there = (repr(each[key]) if key in each else "absent" for each in (facts, theirs))
            if here != there:
                start = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), 0) - 40
                here, there = (_brief(text, max(0, start)) for text in (here, there))
                return (
                    f"process {number} differs from process 0: {key} is {there} there and {here} in process 0; "
                    "all of them need the same"
                )
    return ""


def named(numbers: Iterable[int], processes: int) -> str:
    """Processes of so many, in words.

    >>> named([1], 4), named([1, 2, 3], 8), named(range(1, 40), 64)
    ('process 1 of 4', 'processes 1, 2 and 3 of 8', 'processes 1, 2, 3, 4, 5, 6, 7, 8 and 31 more of 64')
    """
    texts = [str(number) for number in numbers]
    if len(texts) == 1:
        return f"process {texts[0]} of {processes}"
    last = texts[8:] and f"{len(texts) - 8} more"
    first = texts[:8] if last else texts[:-1]
    return f"processes {', '.join(first)} and {last or texts[-1]} of {processes}"


def _gather(listener, links, strangers, processes, facts, wait, say) -> None:
    """Of process 0: fill `links` with those to all others."""
    start = said = time.monotonic()
    facts_of: dict[int, Facts] = {}
    while missing := [number for number in range(1, processes) if number not in links]:
        seconds = time.monotonic() - start
        if seconds >= wait:
            _refuse(
                f"{named(missing, processes)} did not come within {wait:g} s; {_advice('start all of them')}", links
            )
        if time.monotonic() - said >= SAY:
            said = time.monotonic()
            say(f"waiting for {named(missing, processes)}, {_so_far(seconds, wait)}")
        for ready in wait_for([listener, *strangers, *links.values()], TRY):
            if ready is listener:
                strangers.append(Link(listener.accept()[0]))
            elif ready in strangers:
                facts_of |= _welcome(ready, links, strangers, processes)
            else:  # it has nothing to say before all are there: it has ended
                ready.close()
                del links[next(number for number, link in links.items() if link is ready)]
    if refused := difference(facts, facts_of):
        _refuse(refused, links)
    _tell(links.values(), {"refused": ""})


def _welcome(stranger, links, strangers, processes) -> dict[int, Facts]:
    """What a connection says first, which process it is and its facts; {} of one that is none of ours, or says nothing
    yet."""
    try:
        message = stranger.receive(0)
    except Gone:
        message = {}
    if message is None:
        return {}
    strangers.remove(stranger)
    number, count, theirs = (message.get(key) for key in ("process", "processes", "facts"))
    if not isinstance(number, int) or not isinstance(theirs, dict):
        stranger.close()
    elif number in links:
        _tell([stranger], {"refused": f"there is a process {number} of {processes} already; --process I says which"})
        stranger.close()
    else:
        links[number] = stranger
        if count != processes:
            _refuse(f"process {number} was started as one of {count}, process 0 as one of {processes}", links)
        return {number: theirs}
    return {}


def _refuse(text: str, links: Mapping[int, Link]) -> NoReturn:
    _tell(links.values(), {"refused": text})
    raise UserError(text)


def _come(host, port, processes, process, facts, wait, say) -> Link:
    """Of any other process: its link to process 0, once that says that all are there."""
    start = said = time.monotonic()
    link, reason = None, ""
    try:
        while True:
            seconds = time.monotonic() - start
            if seconds >= wait + (ANSWER if link else 0):
                raise UserError(
                    f"process 0 of {processes} did not come to {host}:{port} within {wait:g} s{reason}; "
                    f"{_advice('start it there')}"
                )
            if link is None and time.monotonic() - said >= SAY:
                said = time.monotonic()
                say(f"waiting for process 0 of {processes} at {host}:{port}, {_so_far(seconds, wait)}{reason}")
            try:
                if link is None:
                    link = _connect(host, port)
                    link.send({"process": process, "processes": processes, "facts": facts})
                answer = link.receive(TRY)
            except OSError as error:
                reason = f" ({' '.join(str(error.strerror or error).split())[:100]})"
                time.sleep(TRY)
                continue
            except Gone:
                answer = {}
            if answer is not None and answer.get("refused") is None:  # it ended again, or another program listens there
                link.close()
                link, reason = None, " (it has ended, or another program answers there)"
                time.sleep(TRY)
            elif answer is not None:
                if answer["refused"]:
                    raise UserError(answer["refused"])
                return link
    except BaseException:
        if link is not None:
            link.close()
        raise


def _connect(host: str, port: int) -> Link:
    connection = socket.create_connection((host, port), timeout=TRY)
    connection.settimeout(None)
    if connection.getsockname() == connection.getpeername():  # Linux connects a port where nobody listens to itself
        connection.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return Link(connection)


def _listener(port: int) -> socket.socket:
    family, options = (socket.AF_INET, {})
    if socket.has_dualstack_ipv6():
        family, options = socket.AF_INET6, {"dualstack_ipv6": True}
    try:
        return socket.create_server(("", port), family=family, backlog=1024, **options)
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise UserError(
            f"process 0 cannot listen at port {port} ({reason}); take another one in all processes"
        ) from None


def _tell(links: Iterable[Link], message: Mapping[str, Any]) -> None:
    for link in links:
        try:
            link.send(message)
        except Gone:
            pass  # whoever asks it next will see


def _so_far(seconds: float, wait: float) -> str:
    return f"{seconds:.0f} of {wait:g} s (--wait)"


def _advice(first: str) -> str:
    return f"{first} with the same command, or give more time: --wait SECONDS"


def _brief(text: str, start: int) -> str:
    """A text whole, or a long one from somewhat before the place where it differs from another."""
    if len(text) <= 100:
        return text
    return f"{'...' * bool(start)}{text[start : start + 80]}{'...' * (len(text) > start + 80)}"
