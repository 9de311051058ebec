"""The half of a benchmark that runs in the measured process: answers requests, one JSON object a line.

It imports neither JAX nor PyTorch, because both kinds of process use it.
"""

import json
import os
import resource
import sys
import time


def serve(prepare):
    """Answer `prepare`, `time` and `memory` until the driver closes the pipe.

    prepare(**options) -> (warm, run, info): `warm()` and `run()` block until done; `info` is sent back.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    for line in sys.stdin:
        request = json.loads(line)
        if (kind := request.pop("do")) == "prepare":
            start = time.perf_counter()
            warm, run, answer = prepare(**request)
            answer["prepare_seconds"] = time.perf_counter() - start
        elif kind == "time":
            answer = timed(warm, run, request["calls"])
        else:
            answer = {"peak_mb": peak_megabytes()}
        print(json.dumps(answer), file=answers, flush=True)


def timed(warm, run, calls):
    """One round: a warm-up, since the other processes have had the caches, then `calls` calls, each timed."""
    warm()
    seconds, cpu_start = [], time.process_time()
    for _ in range(calls):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "cpu_seconds": (time.process_time() - cpu_start) / calls}


def peak_megabytes():
    """Largest resident memory of this process so far, in 10^6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
