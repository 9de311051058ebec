"""What becomes of a run that is killed, damaged, starved of disk, signalled, raced or left alone by its peer?

    python experiments/faults.py [--minutes 30] [PART ...] [--count PART=N ...] [--again PART ...]
    python experiments/faults.py --quick

A tiny training, its evaluation, sheets and report are disturbed in every way of `PARTS`, and then the same command is
given again. Each outcome is "same numbers" as those of the undisturbed run, or "one line" with an exit code that is not
0; whatever else it is (a traceback, a hang, a difference that nobody says) is a fault, and the exit code is 1.
Outcomes are kept as they come in runs/faults, so that the same command goes on where it stopped, after --minutes;
results/faults.json counts them. --quick does a few of those of a training in a minute, and writes nothing. Power loss
is not tried: what the system says is written counts as written.
"""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import _faults_damage as damage
from _faults_process import (
    GOOD,
    LINE,
    SAME,
    Ended,
    at_event,
    fails,
    jumping,
    killed,
    noting,
    numbers,
    pictures,
    start,
    topgap,
    verdict,
)

from topgap_jax import engine
from topgap_jax.progress import write_text

ROOT = Path(__file__).parent.parent
RESULT, WORK, TINY = ROOT / "results" / "faults.json", ROOT / "runs" / "faults", ROOT / "tests" / "tiny_config.py"
LIVES = 6  # kills in one life at most: then the run is left alone, and must end with the numbers it should have
EVALUATORS = "accuracy(), regions(fill=mean), robust(pgd(linf(eps), steps=6)), localisation(cam())"
PEERS = 30.0  # seconds in which a process that lost its peer must have ended
WAIT = 40.0  # seconds that it waits for one that has not come (--wait): also for one that is killed before that
WITHIN = 0.02  # seconds after an event, in which what TensorStore writes in C is under way


class Outcome(NamedTuple):
    """fault: which of its part's; count: how many kills, damages, ... it stands for; said: what the command said."""

    fault: str
    verdict: str
    said: str = ""
    count: int = 1
    seconds: float = 0.0


class World(NamedTuple):
    """Undisturbed runs: folder of a whole one; what it measured after the training and after an evaluation; its
    pictures; seconds of each command; the events on files below the folder, as they came, of each command."""

    folder: Path
    work: Path
    numbers: dict[str, Any]
    evaluated: dict[str, Any]
    pictures: dict[str, str]
    seconds: dict[str, float]
    events: dict[str, list[str]]


def train(folder: Path) -> list[object]:
    words = ["train", "--config", TINY, "--workdir", folder, "--config.epochs=4"]
    return [*words, "--config.evaluators=accuracy()"]


def evaluate(folder: Path) -> list[object]:
    return ["evaluate", "--workdir", folder, "--evaluators", EVALUATORS]


def explain(folder: Path) -> list[object]:
    return ["explain", "--workdir", folder, "--count", 14]


def report(folder: Path) -> list[object]:
    return ["report", folder]


COMMANDS = {"train": train, "evaluate": evaluate, "explain": explain, "report": report}


def world(names: Sequence[str]) -> World:
    """The undisturbed runs of these commands, made once."""
    file, folder, work = WORK / "world.json", WORK / "run", WORK / "now"
    work.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        stored = json.loads(file.read_text())
        print(f"undisturbed, in seconds: {stored['seconds']}", flush=True)
        return World(folder, work, **stored)
    found: dict[str, Any] = {"seconds": {}, "events": {}, "evaluated": {}}
    for _ in range(2):  # the second with every program compiled
        shutil.rmtree(folder, ignore_errors=True)
        for name in names:
            ended = topgap(COMMANDS[name](folder), work, noting(work / "events", folder), limit=600)
            if ended.code != 0:
                sys.exit(f"{name} fails undisturbed: {ended.err[-2000:]}")
            found["seconds"][name] = ended.seconds
            found["events"][name] = (work / "events").read_text().splitlines()
            found |= {"numbers": numbers(folder, work)} if name == "train" else {}
            found |= {"evaluated": numbers(folder, work)} if name == "evaluate" else {}
    found["pictures"] = pictures(folder)
    write_text(file, json.dumps(found))
    return World(folder, work, **found)


# Kills


def lives(here: World, draw: Random, name: str, fault: str) -> Outcome:
    """One run that is killed again and again, and then left alone: half of the kills by the clock, half where files are
    written. count: the kills."""
    folder, kills, begin = fresh(here, name), 0, time.monotonic()
    written = folder / "checkpoints" if name == "train" else folder
    places = len(writing(here, name))
    for _ in range(LIVES):
        if fault == "by the clock":
            running = start(COMMANDS[name](folder), here.work)
            time.sleep(draw.uniform(0, here.seconds[name]))
            running.kill(signal.SIGKILL)
            ended = running.ended()
        else:
            after = draw.choice((0.0, draw.uniform(0, WITHIN)))
            at = at_event(draw.randrange(places) + 1, killed(after=after), written)
            ended = topgap(COMMANDS[name](folder), here.work, at)
        kills += ended.code == -signal.SIGKILL
        if ended.code == 0:
            break
        if ended.code != -signal.SIGKILL:
            return Outcome(fault, verdict(ended), said(ended), kills, time.monotonic() - begin)
    return left_alone(here, folder, name, fault, kills, begin)


def writing(here: World, name: str) -> list[int]:
    """The numbers of the events in which a command writes: of a training those of its checkpoints."""
    part = "/checkpoints/" if name == "train" else f"{here.folder}"
    return [number for number, line in enumerate(here.events[name], 1) if part in line] or [1]


def fresh(here: World, name: str) -> Path:
    """A folder in which the command has not run yet."""
    folder = here.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    if name != "train":
        shutil.copytree(here.folder, folder)
        for left in ("sheets", "report.html", "adversarial"):
            shutil.rmtree(folder / left, ignore_errors=True) if left != "report.html" else (folder / left).unlink()
        if name == "evaluate":
            (folder / "evaluation.json").unlink()
        if name == "report":
            shutil.copytree(here.folder / "sheets", folder / "sheets")
            shutil.copytree(here.folder / "adversarial", folder / "adversarial")
    return folder


def same(here: World, folder: Path, name: str) -> bool:
    """Whether a folder holds what the undisturbed command left in its own."""
    if name == "train":
        return numbers(folder, here.work) == here.numbers
    if name == "evaluate":
        rows = lambda found: [row for row in found["rows"] if row["evaluator"] in EVALUATORS]
        return rows(numbers(folder, here.work)) == rows(here.evaluated)
    # A command that is given again leaves what is there, and calls its own sheets test_001-2.png.
    found = {(re.sub(r"-\d+(?=\.png)", "", key), value) for key, value in pictures(folder).items()}
    wanted = {key for key in here.pictures if key.endswith(".png") or name == "report"}
    return {key for key, _ in found} >= wanted and found <= set(here.pictures.items())


def left_alone(here: World, folder: Path, name: str, fault: str, count: int = 1, begin: float = 0) -> Outcome:
    """The same command again, undisturbed: it must end with the numbers it should have."""
    ended = topgap(COMMANDS[name](folder), here.work)
    words = verdict(ended, same=same(here, folder, name)) if ended.code == 0 else f"then {verdict(ended)}"
    words = "silent difference" if words == LINE else words
    return Outcome(fault, words, said(ended) if words != SAME else "", count, time.monotonic() - begin)


def said(ended: Ended) -> str:
    """The line that matters: an error's, else the last of ours."""
    errors = [line for line in ended.err.splitlines() if re.match(r"[\w.]+(Error|Exception|Warning)\b", line)]
    here = str(WORK / "now")
    return next(iter([*errors[-1:], *ended.lines[-1:], *ended.others[-1:]]), "").replace(here, "")[:250]


def kills(name: str) -> Callable[[World, int, Random], Iterator[Outcome]]:
    def part(here, number, draw):
        yield lives(here, draw, name, ("by the clock", "while it writes")[number % 2])

    return part


def kills_of_pictures(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    name = ("explain", "report")[number % 2]
    outcome = lives(here, draw, name, ("by the clock", "while it writes")[number // 2 % 2])
    yield outcome._replace(fault=f"{name}, {outcome.fault}")


def commits(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    """A kill at a rename of a save, just before and just after it."""
    of_a_save = lambda line: line.startswith("os.rename") and "/checkpoints/" in line
    renames = [place for place, line in enumerate(here.events["train"], 1) if of_a_save(line)]
    folder, begin = fresh(here, "train"), time.monotonic()
    place, after = renames[number // 2 % len(renames)], (0.0, 0.001)[number % 2]
    ended = topgap(train(folder), here.work, at_event(place, killed(after=after), folder))
    if ended.code not in (0, -signal.SIGKILL):
        yield Outcome("a rename", verdict(ended), said(ended))
    yield left_alone(here, folder, "train", "a rename", begin=begin)


# Damage


def damaged(what: str) -> Callable[[World, int, Random], Iterator[Outcome]]:
    """So many damages of one kind of file at a time, read by its reader."""

    def part(here, number, draw):
        kind = list(damage.KINDS)[number]
        file, begin = here.work / "tally.json", time.monotonic()
        tally = lambda words: write_text(file, json.dumps(damage.tally(kind, what, each(what), here.folder, here.work)))
        ended = start([], here.work, "tally", run=tally).ended(limit=1800)
        if ended.code != 0:
            yield Outcome(kind, "traceback", ended.err[-250:])
            return
        found = json.loads(file.read_text())
        for words, count in found["verdicts"].items():
            example = found["examples"][words][-1].replace(str(here.work), "")
            yield Outcome(kind, words, example, count, time.monotonic() - begin)

    return part


COUNTS: dict[str, int] = {}  # of this start, by part


def each(what: str) -> int:
    return COUNTS[f"{what}s"]


def damaged_commands(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    """A damage, and then a whole command that reads it: it ends with the right numbers, or says what is wrong."""
    kind, what = draw.choice(list(damage.KINDS)), draw.choice(list(damage.DAMAGES))
    of_report = kind in ("sheets", "adversarial images", "metrics.jsonl")
    name = "report" if of_report else draw.choice(("train", "evaluate"))
    folder, begin = here.work / "run", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(here.folder, folder)
    path = draw.choice(damage.files(kind, folder))
    changed = damage.DAMAGES[what](path.read_bytes(), draw)
    path.unlink() if changed is None else path.write_bytes(changed)
    ended = topgap(COMMANDS[name](folder), here.work)
    # A training makes its own evaluation again; nobody can know of the others that stood in a file that is gone.
    made = here.numbers if (kind, changed, name) == ("evaluation.json", None, "train") else here.evaluated
    whole = lambda: same(here, folder, name) if name == "report" else numbers(folder, here.work) == made
    equal = whole() if ended.code == 0 else None
    yield Outcome(f"{kind}, {name}", verdict(ended, same=equal), f"{what}: {said(ended)}", 1, time.monotonic() - begin)


# Signals, disks, clocks, others


def signals(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    which = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[number % 3]
    cases = ("train", "in a save", "at the start", "evaluate", "explain", "twice", "ignored", "reader gone")
    case = cases[number // 3 % len(cases)]
    name, begin = case if case in COMMANDS else "train", time.monotonic()
    folder, places = fresh(here, name), len(here.events[name])
    fault = f"{which.name}, {case}"
    act = killed(which)
    if case == "reader gone":
        yield reader_gone(here, folder, number % 3)
        return
    if case == "in a save":
        places = writing(here, name)[0] + 3
    elif case == "at the start":
        places = 1
    elif case == "twice":
        places, act = writing(here, name)[0], lambda event, path: [os.kill(os.getpid(), which) for _ in range(2)]
    else:
        places = draw.randrange(places // 4, places // 2)
    happening = at_event(places, act, folder)
    if case == "ignored":
        at = happening
        happening = lambda: (signal.signal(which, signal.SIG_IGN), at())
    ended = topgap(COMMANDS[name](folder), here.work, happening)
    if case == "ignored":
        yield Outcome(fault, verdict(ended, same=same(here, folder, name)), said(ended))
        return
    # Sent twice it ends at once, perhaps by Python's own doing.
    code = None if case == "twice" else 128 + which
    if not (case == "twice" and ended.code in (-which, 128 + which)):
        words = verdict(ended, code=code)
        if words != LINE:
            yield Outcome(fault, words, said(ended))
            return
    yield left_alone(here, folder, name, fault, begin=begin)


def reader_gone(here: World, folder: Path, number: int) -> Outcome:
    """`| head -n 1`, and a pipe that nobody ever reads."""
    read, write = os.pipe()
    name = ("train", "evaluate", "report")[number]
    folder = fresh(here, name)
    if number == 1:
        os.close(read)
    running = start(COMMANDS[name](folder), here.work, out=write)
    os.close(write)
    if number != 1:
        os.read(read, 1)
        os.close(read)
    ended = running.ended()
    return Outcome(f"{name} | head", verdict(ended, same=same(here, folder, name)), said(ended))


def disk_full(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    """A disk of its own (tmpfs) that is too small; then made large."""
    size = int(50_000 * 1.37**number)
    disk, begin = here.work / "disk", time.monotonic()
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        yield Outcome("disk full", "skipped", "no disk can be mounted here")
        return
    try:
        folder = disk / "run"
        cache = {"XDG_CACHE_HOME": str(disk / "cache")} if number % 2 else {}
        ended = topgap(train(folder), here.work, lambda: os.environ.update(cache))
        words = verdict(ended, same=same(here, folder, "train") if ended.code == 0 else None)
        fault = "disk full" + ", the compilation cache's too" * (number % 2)
        if words not in GOOD:
            yield Outcome(fault, words, f"{size} bytes: {said(ended)}")
            return
        subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
        yield left_alone(here, folder, "train", fault, begin=begin)
    finally:
        subprocess.run(["umount", disk], check=True)


def errors(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    """The disk answers ESTALE or EIO, once, to one of the operations on files of a command."""
    which, name = ((errno.ESTALE, errno.EIO)[number % 2], ("train", "evaluate", "explain", "report")[number // 2 % 4])
    folder, begin = fresh(here, name), time.monotonic()
    place = draw.randrange(len(here.events[name])) + 1
    ended = topgap(COMMANDS[name](folder), here.work, at_event(place, fails(which), folder))
    words = verdict(ended, same=same(here, folder, name) if ended.code == 0 else None)
    fault, at = f"{errno.errorcode[which]}, {name}", here.events[name][place - 1].replace(str(here.folder), "")
    if words not in GOOD:
        yield Outcome(fault, words, f"{at}: {said(ended)}", 1, time.monotonic() - begin)
        return
    yield left_alone(here, folder, name, fault, begin=begin)


def clocks(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    name = ("train", "evaluate")[number % 2]
    seconds = draw.choice((-86400.0, 86400.0 * 365, -3.0, 3600.0))
    folder, begin = fresh(here, name), time.monotonic()
    ended = topgap(COMMANDS[name](folder), here.work, jumping(seconds, draw.uniform(0, here.seconds[name])))
    words = verdict(ended, same=same(here, folder, name))
    yield Outcome(f"the clock jumps, {name}", words, said(ended), 1, time.monotonic() - begin)


def two_writers(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    """Two of the same command at once: one ends with the numbers, the other with a line."""
    name = ("train", "evaluate")[number % 2]
    folder, begin = fresh(here, name), time.monotonic()
    first = start(COMMANDS[name](folder), here.work, "first")
    time.sleep(draw.uniform(0, 1))
    second = start(COMMANDS[name](folder), here.work, "second")
    ended = sorted((first.ended(), second.ended()), key=lambda each: each.code != 0)
    fault = f"two of {name}"
    if [each.code for each in ended] == [0, 0]:  # the second began when the first had ended, or both wrote
        yield Outcome(fault, SAME if same(here, folder, name) else "silent difference", said(ended[1]))
        return
    equal = same(here, folder, name) if ended[0].code == 0 else None
    words = [verdict(ended[0], same=equal), verdict(ended[1])]
    bad = [each for each in words if each not in GOOD]
    yield Outcome(fault, bad[0] if bad else words[0], said(ended[1]), 1, time.monotonic() - begin)


# Two processes


def pair(here: World, folder: Path, late: float = 0.0, missing: bool = False) -> dict[int, subprocess.Popen]:
    """Both processes of a training by their numbers, as programs of their own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "topgap_jax", *map(str, train(folder)), "--config.epochs=40", "--no-evaluate"]
    words += ["--coordinator", f"localhost:{port}", "--processes", "2", "--wait", f"{WAIT:g}"]
    processes = {}
    for i in range(1 if missing else 2):
        time.sleep(late * i)
        files = [(here.work / f"peer{i}.{end}").open("w") for end in ("out", "err")]
        processes[i] = subprocess.Popen([*words, "--process", str(i)], stdout=files[0], stderr=files[1], cwd=ROOT)
    return processes


def ended_pair(here: World, processes: dict[int, subprocess.Popen], limit: float) -> list[Ended]:
    begin, ended = time.monotonic(), []
    for i, process in processes.items():
        try:
            code = process.wait(max(0.1, limit - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            code = None
        text = lambda end, i=i: (here.work / f"peer{i}.{end}").read_text(errors="replace")
        ended.append(Ended(code, text("out"), text("err"), round(time.monotonic() - begin, 2)))
    return ended


KINDS = ("killed", "killed", "frozen", "late", "missing")
LOST = [(KINDS[number % 5], number // 5 % 2, number // 2 % 10) for number in range(20)]
LOST += [each for tenth in range(10) for each in (("killed", 0, tenth), ("killed", 1, tenth)) if each not in LOST]
"""What happens to which of two processes in which tenth of their time: either is killed in each."""


def peers(here: World, number: int, draw: Random) -> Iterator[Outcome]:
    """Of two processes one is killed or frozen at some moment, comes late, or never: the other ends soon, with a line;
    then both are started again, and end with the numbers of two that were left alone."""
    file = WORK / "pair.json"
    folder = here.work / "pair"
    shutil.rmtree(folder, ignore_errors=True)
    if not file.is_file():
        begin = time.monotonic()
        ended = ended_pair(here, pair(here, folder), 300)
        if [each.code for each in ended] != [0, 0]:
            sys.exit(f"two processes fail undisturbed: {ended[0].err[-1000:]}")
        file.write_text(json.dumps({"numbers": numbers(folder, here.work), "seconds": time.monotonic() - begin}))
        shutil.rmtree(folder)
    alone = json.loads(file.read_text())
    (kind, victim, tenth), begin = LOST[number], time.monotonic()
    processes = pair(here, folder, late=draw.uniform(5, 15) * (kind == "late"), missing=kind == "missing")
    try:
        if kind in ("killed", "frozen"):
            time.sleep(alone["seconds"] * (tenth + 0.5) / 10)
            processes[victim].send_signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        lost = victim if kind in ("killed", "frozen") else None
        rest = {i: process for i, process in processes.items() if i != lost}
        ended = ended_pair(here, rest, 400 if lost is None else WAIT + PEERS)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    fault = f"process {victim} {kind}" if kind != "missing" else "process 1 missing"
    words = [verdict(each, same=True if each.code == 0 and kind != "missing" else None) for each in ended]
    bad = [each for each in words if each not in GOOD]
    if bad:
        yield Outcome(fault, bad[0], said(ended[words.index(bad[0])]), 1, time.monotonic() - begin)
        return
    ended = ended_pair(here, pair(here, folder), 300)
    equal = [each.code for each in ended] == [0, 0] and numbers(folder, here.work) == alone["numbers"]
    yield Outcome(fault, SAME if equal else "silent difference", said(ended[0]), 1, time.monotonic() - begin)


class Part(NamedTuple):
    """about: a line of the table; count: kills, cases, or damages of each kind; quick: of --quick; of_kinds: whether
    the cases are the kinds of files, each with `count` damages."""

    about: str
    case: Callable[[World, int, Random], Iterator[Outcome]]
    count: int
    quick: int
    of_kinds: bool = False


PARTS = {
    "training": Part("kill -9 in a training, half of them while it saves", kills("train"), 200, 2),
    "evaluation": Part("kill -9 in an evaluation", kills("evaluate"), 50, 0),
    "pictures": Part("kill -9 in explain and report", kills_of_pictures, 20, 0),
    "commits": Part("kill -9 at a rename of a save", commits, 20, 1),
    "flipped bits": Part("one bit flipped, of each kind of file", damaged("flipped bit"), 2000, 50, True),
    "truncations": Part("the end of a file cut off, of each kind", damaged("truncation"), 200, 10, True),
    "deletions": Part("a file gone, of each kind", damaged("deletion"), 200, 10, True),
    "damaged runs": Part("a damaged file, read by a whole command", damaged_commands, 100, 0),
    "signals": Part("signals, and readers that go away", signals, 24, 1),
    "disk full": Part("a disk of 20 sizes that is full", disk_full, 20, 1),
    "disk errors": Part("ESTALE and EIO", errors, 80, 0),
    "clock": Part("a clock that jumps", clocks, 8, 0),
    "two writers": Part("two of the same command at once", two_writers, 8, 0),
    "two processes": Part("of two processes one is killed, frozen, late or missing", peers, len(LOST), 0),
}


def stored() -> list[dict[str, Any]]:
    """The outcomes of all starts so far."""
    file = WORK / "outcomes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table shows of each part: how many were asked for and done, and their verdicts, by fault."""
    parts = {}
    for name, part in PARTS.items():
        mine = [row for row in rows if row["part"] == name]
        faults: dict[str, Counter] = {}
        said_of: dict[str, list[str]] = {}
        for row in mine:
            faults.setdefault(row["fault"], Counter())[row["verdict"]] += row["count"]
            if row["verdict"] not in GOOD and len(said_of.setdefault(row["verdict"], [])) < 3:
                said_of[row["verdict"]].append(f"{row['fault']}: {row['said']}")
        parts[name] = {
            "about": part.about,
            "asked": part.count,
            "each": part.of_kinds,
            "done": sum(row["count"] for row in mine),
            "faults": {fault: dict(verdicts) for fault, verdicts in sorted(faults.items())},
            "said": said_of,
            "slowest": round(max((row["seconds"] for row in mine), default=0), 1),
            "commits": sorted({row["commit"] for row in mine}),
        }
    return parts


def done_of(name: str, rows: list[dict[str, Any]]) -> int:
    mine = [row for row in rows if row["part"] == name]
    return len({row["case"] for row in mine}) if PARTS[name].of_kinds else sum(row["count"] for row in mine)


def work_through(here: World, names: list[str], until: float, commit: str, keep: bool) -> list[dict[str, Any]]:
    """Cases of the parts, one after the other, until all are done or the time is over; their outcomes."""
    rows = stored() if keep else []
    for name in names:
        part, asked = PARTS[name], COUNTS[name]
        limit = (len(damage.KINDS) if asked else 0) if part.of_kinds else asked
        number = max([row["case"] + 1 for row in rows if row["part"] == name], default=0)
        while done_of(name, rows) < limit and number < 4 * limit + 10 and time.monotonic() < until:
            if part.of_kinds and number >= limit:
                break
            for outcome in part.case(here, number, Random(f"{name} {number}")):
                row = {"part": name, "case": number, **outcome._asdict(), "commit": commit}
                row["seconds"] = round(row["seconds"], 2)
                rows.append(row)
                if keep:
                    with (WORK / "outcomes.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
                if outcome.verdict not in GOOD:
                    print(f"{name} {number}: {outcome.fault}: {outcome.verdict}: {outcome.said}", flush=True)
            number += 1  # some cases stand for nothing, such as the kill of what had ended
        print(f"{name}: {done_of(name, rows)} of {limit}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is named")
    parser.add_argument("--minutes", type=float, default=30, help="of the clock, after which the rest is left")
    parser.add_argument("--count", action="append", default=[], metavar="PART=N", help="less than the issue asks for")
    parser.add_argument("--again", action="append", default=[], metavar="PART", help="forget what was done of a part")
    parser.add_argument(
        "--quick", action="store_true", help="a few of those of a training, in a minute; nothing is written"
    )
    arguments = parser.parse_args()
    names, until = arguments.parts or list(PARTS), time.monotonic() + 60 * arguments.minutes
    COUNTS.update({name: part.quick if arguments.quick else part.count for name, part in PARTS.items()})
    COUNTS.update({name: int(number) for name, _, number in (each.partition("=") for each in arguments.count)})
    if unknown := {*names, *arguments.again, *COUNTS} - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if arguments.quick:
        global WORK
        WORK = Path(tempfile.mkdtemp(prefix="faults"))
    if arguments.again:
        kept = [row for row in stored() if row["part"] not in arguments.again]
        write_text(WORK / "outcomes.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    os.environ["XDG_CACHE_HOME"] = str(WORK / "cache")
    engine.found()  # read once, before children are forked
    here = world(["train"] if arguments.quick else list(COMMANDS))
    about = WORK / "about.json"
    start([], here.work, "about", run=lambda words: _about(about)).ended()
    made_with = json.loads(about.read_text())
    rows = work_through(here, names, until, made_with["commit"], keep=not arguments.quick)
    if not arguments.quick:
        made_with["command"] = "experiments/faults.py"
        write_text(RESULT, json.dumps({**made_with, "parts": summary(rows)}, indent=1) + "\n")
    else:
        shutil.rmtree(WORK)
    bad = [row for row in rows if row["verdict"] not in (*GOOD, "skipped")]
    print(f"{sum(row['count'] for row in rows)} outcomes, {sum(row['count'] for row in bad)} of them faults")
    return 1 if bad else 0


def _about(file: Path) -> int:
    from topgap_jax.run.provenance import provenance

    file.write_text(json.dumps(provenance()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
