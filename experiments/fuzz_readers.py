"""Do odd bytes, given to any reader of files or texts, end in a value or in one line, and never in anything else?

    python experiments/fuzz_readers.py [--minutes 90] [READER ...] [--keep]

Coverage-guided (atheris, in the extra `fuzz`): a process for each reader of `_fuzz_targets.TARGETS` in turn, over small
valid inputs and what earlier runs found (runs/fuzz). A reader must return, or raise a UserError whose line on the
terminal has at most 500 characters, none of them for control; in 10 CPU seconds, in 1 GB more than the input has, and
without running, starting or writing anything. What fails is kept in runs/fuzz/READER/failures, the smallest of a kind,
and the run goes on. The minutes are CPU time, divided over the readers, and add up over runs in
results/fuzz_readers.json; several of these commands, each with its own READERs, may run side by side. --keep writes
the smallest input of every outcome to tests/fuzzed, which a test reads again.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

try:
    import atheris
except ImportError:
    sys.exit("fuzz_readers.py needs atheris: pip install -e '.[fuzz]'")

# What is fuzzed: its branches are counted.
ROOMS = [f"topgap_jax.{room}" for room in (
    "build", "data", "measure", "pretrained", "progress", "report", "run", "setup", "stored")]  # fmt: skip
with atheris.instrument_imports(include=["PIL", "tensorflow_datasets.core", *ROOMS], enable_loader_override=False):
    import _fuzz_targets
    from _fuzz_targets import SOMETIMES, TARGETS, fresh, outcome, words

    from topgap_jax.cli import PICTURES
    from topgap_jax.progress import write_text
    from topgap_jax.run.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT, KEPT, WORK = ROOT / "results" / "fuzz_readers.json", ROOT / "tests" / "fuzzed", ROOT / "runs" / "fuzz"
SECONDS, MEMORY = 10.0, 10**9  # of CPU time; bytes above the input's
HANG = 300  # seconds of the clock, on a machine that other work shares
LARGEST = 2**18  # bytes of an input: a file of records has 128 kB at least
SLICE = 60.0  # CPU seconds that a reader has at a time
SMALL, EACH = 3000, 40  # of what is kept in tests: bytes of an input, inputs a reader
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
          "pickle.find_class", "ctypes.dlopen", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request",
          "webbrowser.open", "sys.settrace", "import")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Watch:
    """Notes, by Python's audit events, what a reader starts, imports, runs or writes outside the folder it is given."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.seen = str(folder), False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event == "import" and arguments[0].partition(".")[0] in sys.stdlib_module_names:
            return  # such as the decoder of UTF-32, of which JSON may be
        if event in STARTS:
            self.seen.append(f"{event} {arguments[0]!r:.80}")
        elif event == "exec" and not self._of_a_module(arguments[0]):
            self.seen.append(f"exec of {_short(arguments[0].co_filename)}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._outside(event, arguments[0])
        elif event in CHANGES:
            self._outside(event, arguments[0])

    def _of_a_module(self, code):
        """Whether it is of our own files (the page's template), or a NamedTuple that Python's library makes."""
        return code.co_filename.startswith(str(ROOT / "topgap_jax")) or "namedtuple" in code.co_filename

    def _outside(self, event, path):
        if isinstance(path, str | bytes | os.PathLike) and not os.fsdecode(path).startswith((self.folder, "/dev/null")):
            self.seen.append(f"{event} of {_short(path)}")


def _short(path: str | bytes | os.PathLike) -> str:
    """The end of a path, which is the same on every machine."""
    return repr("/".join(Path(os.fsdecode(path)).parts[-2:]))[:80]


class Count:
    """What a process found, written to a file every few seconds, since a crash in C asks nobody before."""

    def __init__(self, file: Path):
        self.file, self.written = file, time.process_time()
        self.numbers = {"inputs": 0, "read": 0, "refused": 0, "slowest": 0.0, "largest_mb": 0}
        self.failures, self.cases = {}, {}

    def case(self, words: str, content: bytes) -> None:
        """Keep the smallest input of an outcome."""
        kind = re.sub(r"'.*?'|\".*?\"|[\d.,()\[\]{}-]+|/\S*", "_", words)[:70]
        if len(content) < len(self.cases.get(kind, b" " * (SMALL + 1))):
            self.cases[kind] = content

    def failure(self, words: str, content: bytes) -> None:
        number, smallest = self.failures.get(words, (0, content))
        self.failures[words] = number + 1, min(smallest, content, key=len)

    def write(self, every: float = 0.0) -> None:
        if time.process_time() - self.written < every:
            return
        self.written, text = time.process_time(), lambda content: base64.b64encode(content).decode()
        stored = {
            **self.numbers,
            "cpu_seconds": time.process_time(),
            "failures": {words: [number, text(content)] for words, (number, content) in self.failures.items()},
            "cases": {words: text(content) for words, content in self.cases.items()},
        }
        self.file.write_text(json.dumps(stored))


def fuzz(name: str, seconds: float, seed: int) -> None:
    """One reader in this process, which it ends."""
    work = WORK / name
    target, memory = TARGETS[name], "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz", dir=memory))
    fresh(target, folder)
    count, warned = Count(work / "count.json"), []
    _fuzz_targets.SOMETIMES = 1  # what is imported on first use is imported now
    for content in [*target.seeds(), *kept(name)]:
        (work / "corpus" / hashlib.sha1(content).hexdigest()).write_bytes(content)
        with contextlib.suppress(Exception):
            outcome(target, folder, content)
    _fuzz_targets.SOMETIMES = SOMETIMES
    watch = Watch(folder)
    warnings.simplefilter("always")
    warnings.simplefilter("ignore", DeprecationWarning)  # as Python has it
    warnings.filterwarnings("ignore", module=PICTURES)  # as the command line has it
    warnings.showwarning = lambda message, *_: warned.append(re.sub(r"\d+", "N", f"warns: {message}")[:80])
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages() + 2 * MEMORY, resource.RLIM_INFINITY))
    end = time.process_time() + seconds
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def one(content: bytes) -> None:
        if time.process_time() > end:
            count.write()
            os._exit(0)
        before, start, wrong = peak(), time.process_time(), None
        warned.clear()
        watch.seen.clear()
        watch.on = True
        try:
            line = outcome(target, folder, content)
            count.case(line, content)
            count.numbers["refused" if line else "read"] += 1
        except (Exception, SystemExit) as error:
            wrong = words_of(error)
        watch.on = False
        taken, grown = time.process_time() - start, peak() - before
        count.numbers["inputs"] += 1
        count.numbers["slowest"] = max(count.numbers["slowest"], round(taken, 3))
        count.numbers["largest_mb"] = max(count.numbers["largest_mb"], grown // 10**6)
        wrong = wrong or next(iter([*watch.seen, *warned]), None)
        wrong = wrong or (f"takes {SECONDS:.0f} s and more" if taken > SECONDS else None)
        wrong = wrong or ("takes 1 GB and more" if grown > MEMORY + len(content) else None)
        if wrong:
            count.failure(wrong, content)
        count.write(every=5.0)

    def change(content: bytes, largest: int, number: int) -> bytes:
        draw = Random(number)
        mutate = lambda part: bytes(atheris.Mutate(part, max(largest, len(part) + 1)))
        if target.change is None or draw.random() < 0.2:
            return mutate(content)[:largest]
        for _ in range(draw.choice((1, 1, 2, 4))):
            content = target.change(content, draw, mutate)
        return content[:largest]

    options = [f"-max_len={LARGEST}", f"-seed={seed}", f"-timeout={HANG}", "-rss_limit_mb=0", "-verbosity=0"]
    options += [f"-artifact_prefix={work}/last-", "-len_control=0"]
    if name == "text":
        (work / "words").write_text("".join(json.dumps(word) + "\n" for word in words() if word.isascii()))
        options.append(f"-dict={work / 'words'}")
    atheris.Setup([sys.argv[0], *options, str(work / "corpus")], one, custom_mutator=change)
    atheris.Fuzz()


def words_of(error: BaseException) -> str:
    """An exception by its type and the last line of ours that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "topgap_jax/" in frame.filename]
    at = f" in {frames[-1].filename.rpartition('topgap_jax/')[2]}, {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{at}"


def kept(name: str) -> list[bytes]:
    """The inputs of a reader in tests/fuzzed."""
    path = KEPT / f"{name}.json"
    return [base64.b64decode(text) for text in json.loads(path.read_text()).values()] if path.is_file() else []


def keep(name: str, count: dict) -> None:
    """Add the inputs of new outcomes, and of failures, to tests/fuzzed, the smallest of each."""
    path = KEPT / f"{name}.json"
    cases = json.loads(path.read_text()) if path.is_file() else {}
    cases |= {f"was {words}": text for words, (_, text) in count["failures"].items() if len(text) < 2 * SMALL}
    for words, text in count["cases"].items():
        if len(text) < len(cases.get(words, text + "x")):
            cases[words] = text
    order = sorted(cases, key=lambda words: (not words.startswith("was "), len(cases[words])))[:EACH]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({words: cases[words] for words in order}, indent=0, sort_keys=True) + "\n")


def run(name: str, seconds: float, seed: int) -> dict:
    """What a child found in which one reader is fuzzed; one that the reader ended, or made wait for ever, is a failure
    too."""
    work = WORK / name
    (work / "corpus").mkdir(parents=True, exist_ok=True)
    for left in (*work.glob("last-*"), *work.glob("count.json")):
        left.unlink()
    ended = forked(lambda: fuzz(name, seconds, seed), work / "said")
    said, path = (work / "said").read_text(errors="replace"), work / "count.json"
    if not path.is_file():
        sys.exit(f"{name}: no input was read\n{said[-2000:]}")
    count = json.loads(path.read_text())
    if ended:
        inputs = [left.read_bytes() for left in work.glob("last-*")]
        words = f"the process ended with {ended}: {(said.strip().splitlines() or ['?'])[-1][:80]}"
        count["failures"][words] = [1, base64.b64encode(inputs[0] if inputs else b"").decode()]
        print(said[-1500:], file=sys.stderr)
    for words, (_, text) in count["failures"].items():
        file = work / "failures" / re.sub(r"\W+", "_", words)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(base64.b64decode(text))
    return count


def forked(call: Callable[[], object], said: Path) -> int:
    """The exit code of a child that makes the call; what it prints goes to a file. Everything is imported before, once,
    and no thread is there yet."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def added(before: dict, count: dict) -> dict:
    """The numbers of a reader after another run."""
    numbers = {key: before.get(key, 0) + count[key] for key in ("inputs", "read", "refused")}
    numbers |= {key: max(before.get(key, 0), count[key]) for key in ("slowest", "largest_mb")}
    numbers["cpu_minutes"] = round(before.get("cpu_minutes", 0) + count["cpu_seconds"] / 60, 2)
    failures = dict(before.get("failures", {}))
    for words, (number, _) in count["failures"].items():
        failures[words] = failures.get(words, 0) + number
    return {**numbers, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help="which; all of them if none is named")
    parser.add_argument("--minutes", type=float, default=90, help="of CPU time in all")
    parser.add_argument("--seed", type=int, help="of the fuzzer; by default one more than that of the run before")
    parser.add_argument("--keep", action="store_true", help="write the smallest input of every outcome to tests/fuzzed")
    arguments = parser.parse_args()
    if unknown := set(arguments.readers) - set(TARGETS):
        parser.error(f"there is no reader {', '.join(sorted(unknown))}; they are {', '.join(TARGETS)}")
    names = arguments.readers or list(TARGETS)
    results = lambda: json.loads(RESULT.read_text()) if RESULT.is_file() else {"readers": {}}
    seed = results().get("seed", 0) + 1 if arguments.seed is None else arguments.seed
    WORK.mkdir(parents=True, exist_ok=True)
    about = WORK / "about.json"
    forked(lambda: about.write_text(json.dumps(provenance())), WORK / "said")  # it starts JAX, which threads follow
    left = dict.fromkeys(names, 60 * arguments.minutes / len(names))
    while left:
        for name in list(left):
            seconds = min(left[name], SLICE)
            count = run(name, seconds, seed)
            left[name] -= seconds
            if left[name] <= 1:
                del left[name]
            if arguments.keep:
                keep(name, count)
            stored = results()  # others may work on other readers
            numbers = stored["readers"][name] = added(stored["readers"].get(name, {}), count)
            print(f"{name:16} {numbers['inputs']:9,} inputs, {numbers['cpu_minutes']:6.2f} CPU minutes", flush=True)
            for words, (number, _) in count["failures"].items():
                print(f"{'':16} {number} x {words}", flush=True)
            minutes = round(sum(each["cpu_minutes"] for each in stored["readers"].values()), 1)
            stored = {
                **stored,
                **json.loads(about.read_text()),
                "seed": seed,
                "command": "experiments/fuzz_readers.py",
                "cpu_minutes": minutes,
                "readers": stored["readers"],
            }
            write_text(RESULT, json.dumps(stored, indent=1) + "\n")
        seed += 1


if __name__ == "__main__":
    main()
