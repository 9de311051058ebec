"""Do damaged files of weights, of every format, give numbers or one line, and never anything else?

    python experiments/fuzz_weight_files.py --minutes 60 [FILE ...]

Valid files are damaged at random: bytes and bits changed, parts cut off, removed, repeated, exchanged, and (of pickles)
operations put in. `pretrained.describe` and `pretrained.tensors` must return or raise a UserError of one line, within a
second and 500 MB of memory. Beside the FILEs given, small ones are damaged that are written as the tests write them.
The minutes are of CPU time, so that other work beside it takes nothing away; SIGTERM ends it earlier. Writes
results/fuzz_weight_files.json, where runs with other seeds add up; the first file that fails is kept as fuzz_failure.
"""

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_weight_files import legacy, tensor, zipped

from topgap_jax import pretrained
from topgap_jax.errors import UserError
from topgap_jax.run.provenance import provenance

SECONDS, MEMORY = 1.0, 500 * 2**20
PICKLE = (
    b"R", b"b", b"Q", b"t", b"(", b"}", b"]", b"u", b"e", b"s", b"a", b"\x85", b"\x93", b"\x81", b"h\x00",
    b"q\x00", b"N",
    b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8,
)  # fmt: skip


def seeds(folder):
    """Small valid files of every format."""
    arrays = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.running_var": np.ones(2, np.float16)}
    tree = {
        "epoch": 3,
        "state_dict": {
            "module.a.weight": tensor("0", "FloatStorage", 12, 0, (3, 4), (1, 3)),
            "module.b.running_var": tensor("1", "HalfStorage", 2, 0, (2,), (1,)),
        },
    }
    storages = {"0": arrays["a.weight"], "1": arrays["b.running_var"]}
    zipped(folder / "zip.pth", tree, storages)
    legacy(folder / "legacy.bin", tree, storages)
    np.savez(folder / "w.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    save_file(arrays, folder / "w.safetensors", {"mean": "0.5,0.5,0.5"})
    return list(folder.iterdir())


def damaged(good, draw):
    data = bytearray(good)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        place, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if place < len(data):
                data[place] = draw.randrange(256)
            case 1 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length] * draw.choice((1, 2, 100))
            case 5:
                data[place : place + length] = draw.choice((b"\x00", b"\xff", b"\x7f")) * length
            case 6:
                data[place:place] = draw.choice(PICKLE)
        if not data:
            return b""
    return bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("files", nargs="*", type=Path, help="valid files to damage too")
    options = parser.parse_args()
    draw, count, slowest = random.Random(options.seed), dict.fromkeys(("read", "refused"), 0), 0.0
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    with tempfile.TemporaryDirectory() as folder:
        files = [(path.suffix, path.read_bytes()) for path in [*seeds(Path(folder)), *options.files]]
        while time.process_time() < 60 * options.minutes and not stop:
            suffix, good = draw.choice(files)
            path = Path(folder, f"damaged{suffix}")
            path.write_bytes(damaged(good, draw))
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                try:
                    pretrained.describe(path)
                    pretrained.tensors(path)
                    count["read"] += 1
                except UserError as error:
                    assert "\n" not in str(error), "more than one line"
                    count["refused"] += 1
                seconds, grown = (
                    time.process_time() - start,
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
                )
                slowest = max(slowest, seconds)
                assert seconds < SECONDS and grown * 1024 < MEMORY, f"{seconds:.1f} s, {grown} kB"
            except BaseException:
                Path(f"fuzz_failure{suffix}").write_bytes(path.read_bytes())
                raise
    print(f"{count}, slowest {slowest:.3f} CPU seconds")
    minutes = round(time.process_time() / 60, 1)
    path = Path(__file__).parent.parent / "results" / "fuzz_weight_files.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    run = {**provenance(), "cpu_minutes": minutes, "seed": options.seed, **count, "slowest": slowest}
    runs = [*(each for each in runs if each["seed"] != options.seed), run]
    total = {key: round(sum(each[key] for each in runs), 1) for key in ("cpu_minutes", "read", "refused")}
    path.write_text(
        json.dumps({**total, "slowest": max(each["slowest"] for each in runs), "runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
