"""The half of a benchmark that asks: one process per setting, all alive and idle, each timed in turn (A B C A B C ...).

Figures drift by 1.5x between minutes on a shared machine, ratios of neighbouring rounds much less: so the result is the
median of the per-round ratios, with its range, beside the minima.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_ARENA_MAX": "1"}
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # or a second run would show no compile time


def start(script, python=sys.executable, environment=None):
    """A worker process that waits for requests."""
    return subprocess.Popen(
        [python, str(HERE / script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )


def ask(process, do, **options):
    """Send one request and wait for its answer."""
    process.stdin.write(json.dumps({"do": do} | options) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a benchmark process ended with status {process.wait()} while asked to {do} {options}")
    return json.loads(line)


def stop(processes):
    """Close the pipes: each worker ends by itself."""
    for process in processes.values():
        process.stdin.close()
    for process in processes.values():
        process.wait()


def interleave(processes, rounds, seconds):
    """Time every process `rounds` times in turn, about `seconds` each time: {name: [answer of each round]}."""
    first = {name: ask(process, "time", calls=1)["seconds"][0] for name, process in processes.items()}
    calls = max(1, round(seconds / min(first.values())))
    times = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            times[name].append(ask(process, "time", calls=calls))
    return times


def figures(times):
    """Milliseconds: median over rounds, minimum over calls, median of the CPU time of a call."""
    return {
        "median_ms": 1e3 * statistics.median(statistics.mean(answer["seconds"]) for answer in times),
        "min_ms": 1e3 * min(min(answer["seconds"]) for answer in times),
        "cpu_ms": 1e3 * statistics.median(answer["cpu_seconds"] for answer in times),
        "calls_a_round": len(times[0]["seconds"]),
        "rounds_ms": [round(1e3 * statistics.mean(answer["seconds"]), 2) for answer in times],
    }


def ratios(above, below):
    """Per-round time of `above` over that of `below`: median and range; and the same of CPU time and of the minima."""
    rounds = [statistics.mean(a["seconds"]) / statistics.mean(b["seconds"]) for a, b in zip(above, below)]
    cpu = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(above, below)]
    minima = min(min(a["seconds"]) for a in above) / min(min(b["seconds"]) for b in below)
    return {
        "median": statistics.median(rounds),
        "range": [min(rounds), max(rounds)],
        "of_minima": minima,
        "cpu_median": statistics.median(cpu),
    }


def machine():
    """What the figures were measured on, and how busy it was."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": load_average(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def load_average():
    """Runnable processes over the last 1, 5 and 15 minutes: far above the number of cores, the wall times say
    little."""
    return [round(load, 2) for load in os.getloadavg()]


def processor():
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit():
    """The repository's commit, with "+" where files differ from it; "" outside a repository."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, capture_output=True, text=True)
    return answer.stdout.strip()


def write(name, result):
    """Store a result as results/<name>.json, with the command that made it."""
    path = HERE.parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    words = [
        Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]
    ]  # this machine's folders say nothing
    command = " ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *words])
    path.write_text(json.dumps({"command": command} | result, indent=1) + "\n")
    print(f"\nwritten: {path.relative_to(HERE.parent)}")


def table(head, rows):
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
