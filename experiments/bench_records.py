"""A set of the size of ImageNet: opened, resumed, streamed, trained on and evaluated, with what that takes.

    python experiments/bench_records.py

Writes 1,280,000 JPEG records of 32 x 32 pixels in 1,000 classes and 16 ArrayRecord shards as TFDS prepares them (about
1.5 GB), measures, and deletes them. Each part is a process of its own, so that memory is that part's. The pictures are
4,096 different ones, each again under many labels: what is read and decoded of a record does not depend on that.

open        from the folder's path to the first record, after the imports: seconds, and growth of resident memory
resume      from a new stream to its first batch, at step 0 and at random steps of 20 epochs
rate        records/s in random order, in turn: a loop over TFDS's own random access in one thread, one over ours, the
            stream, and the stream with two and eight threads and with two worker processes; the same of 256 x 256
            pixels, of a set of 4,096 records
steps       `fit` of a tiny network for 20,000 steps of 16 records: resident memory every 1,000 steps
fit         ResNet-20, batch 128, streamed: CPU seconds of the loop beside those of its step alone plus those of one
            thread's decoding of as many records
evaluate    peak memory of `topgap evaluate` by the number of images, held on the device and streamed

Bounds of each are in `BOUNDS`; the last column says which are kept.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _bench_driver as driver
import numpy as np
from PIL import Image

RECORDS, SHARDS, CLASSES, SIDE, PICTURES = 1_280_000, 16, 1000, 32, 4096
LARGER = 256  # the side of the pictures of which threads decode several at once
RESULT = Path(__file__).parent.parent / "results" / "bench_records.json"
CORE = "tensorflow_datasets.core.features"
FREE = 4 * 10**9  # bytes of disk that must be free
PARTS = ("open", "resume", "rate", "steps", "fit", "evaluate")
BOUNDS = {
    "opening, s": (1, "most"),
    "opening, MB": (20, "most"),
    "resume over fresh start, s": (1, "most"),
    "growth over the steps, MB": (20, "most"),
    "stream / a loop over TFDS's random access": (1.5, "least"),
    "stream / a loop over ours": (1.5, "least"),
    "stream with two processes / a loop over ours": (1.5, "least"),
    "stream / a loop over ours, 256 x 256": (1.5, "least"),
    "alone / fit, CPU": (0.95, "least"),
    "evaluate, bytes a pixel byte": (1.0, "most"),
    "evaluate streamed, bytes a pixel byte": (0.05, "most"),
}
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.source = "tfds({folder!r})"
    config.train, config.test = "train", "train[:1000]"
    config.image_size = ({side}, {side})
    config.backbone = {backbone!r}
    config.batch = {batch}
    config.epochs = {epochs}
    config.optimizer = "sgd(.01)"
    config.checkpoint_every = 1000000
    return config
"""
TINY = "small_resnet(widths=(4,), stem=4, stem_kernel=3, stem_stride=4)"


def make(folder: Path, records: int, side: int = SIDE) -> int:
    """Write the set; its bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (PICTURES, side // 4, side // 4, 3), np.uint8)
    pictures = []
    for pixels in coarse:
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((side, side)).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    shape = {"dimensions": ["-1", "-1", "3"]}
    features = {
        "image": {
            "image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape},
            "pythonClassName": f"{CORE}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": str(CLASSES)},
            "pythonClassName": f"{CORE}.class_label_feature.ClassLabel",
        },
    }
    folder.mkdir(parents=True)
    content = {"featuresDict": {"features": features}, "pythonClassName": f"{CORE}.features_dict.FeaturesDict"}
    (folder / "features.json").write_text(json.dumps(content))
    (folder / "label.labels.txt").write_text("".join(f"class{number}\n" for number in range(CLASSES)))
    lengths = [len(range(shard, records, SHARDS)) for shard in range(SHARDS)]
    example = tf_example_pb2.Example()
    image, label = (example.features.feature[key] for key in ("image", "label"))
    image.bytes_list.value.append(b"")
    label.int64_list.value.append(0)
    for shard, length in enumerate(lengths):
        path = folder / f"records-train.array_record-{shard:05d}-of-{SHARDS:05d}"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for picture, number in zip(generator.integers(0, PICTURES, length), generator.integers(0, CLASSES, length)):
            image.bytes_list.value[0], label.int64_list.value[0] = pictures[picture], int(number)
            writer.write(example.SerializeToString())
        writer.close()
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": "1",
        "shardLengths": list(map(str, lengths)),
    }
    info = {"name": "records", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return sum(path.stat().st_size for path in folder.iterdir())


def resident_mb() -> float:
    """Megabytes of this process's memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def opened(folder: str):
    from topgap_jax import data

    return data.tfds(folder)("train")


def part_open(folder: str, options) -> dict:
    with tempfile.TemporaryDirectory() as place:  # the imports: some are made when a set is opened and read
        make(Path(place) / "few", 64)
        opened(str(Path(place) / "few"))[0]
    before, start, cpu = resident_mb(), time.perf_counter(), time.process_time()
    source = opened(folder)
    source[len(source) // 3]
    cpu = time.process_time() - cpu
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu, "mb": resident_mb() - before}


def part_resume(folder: str, options) -> dict:
    from topgap_jax import data

    source = opened(folder)
    steps = np.random.default_rng(1).integers(1, 20 * (len(source) // 128), 5).tolist()
    from topgap_jax.data.stream import _kept_epoch

    seconds, cpu = {}, {}
    for step in [0, 0, *steps]:  # the first start reads what every later one finds read
        _kept_epoch.cache_clear()  # a process that starts has no order yet
        start, before = time.perf_counter(), time.process_time()
        with data.stream(source, (SIDE, SIDE), seed=0, batch=128) as batches:
            batches.set_state({"step": step})
            rows = next(batches)
            seconds[step], cpu[step] = time.perf_counter() - start, time.process_time() - before
        epoch, position = divmod(step, len(source) // 128)
        assert (rows["id"] == data.epoch_ids(0, epoch, len(source), 128)[position]).all()
    return {
        "fresh_seconds": seconds[0],
        "resumed_seconds": {str(step): seconds[step] for step in steps},
        "cpu_seconds": cpu,
    }


def part_rate(folder: str, options) -> dict:
    with tempfile.TemporaryDirectory() as place:
        larger = Path(place) / "larger" / "1.0.0"
        make(larger, PICTURES, LARGER)
        return {
            str(SIDE): rates(folder, SIDE, 10, options.rate_rounds),
            str(LARGER): rates(str(larger), LARGER, 3, options.rate_rounds),
        }


def rates(folder: str, side: int, batches: int, rounds: int) -> dict:
    """Of many short turns, since the machine's speed changes: so many batches of 128 records each."""
    from topgap_jax import data

    count = 128 * batches
    source, size, draw = opened(folder), (side, side), np.random.default_rng(2)
    streams = {
        "stream": data.stream(source, size, seed=0, batch=128),
        "stream with two threads": data.stream(source, size, seed=0, batch=128, threads=2),
        "stream with eight threads": data.stream(source, size, seed=0, batch=128, threads=8),
        "stream with two processes": data.stream(source, size, seed=0, batch=128, workers=2),
    }
    decode = {"TFDS": tfds_decode(folder), "ours": lambda index: data.decode(source, index, size, extras=False)}
    seconds = {name: [] for name in (*decode, *streams)}
    for _ in range(rounds):
        some = draw.integers(0, len(source), count).tolist()
        for name, one in decode.items():
            start = time.perf_counter()
            for index in some:
                one(index)
            seconds[name].append((time.perf_counter() - start) / count)
        for name, stream in streams.items():
            for _ in range(8):  # which were read ahead while the others had their turns
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            seconds[name].append((time.perf_counter() - start) / count)
    for stream in streams.values():
        stream.close()
    ratio = lambda stream, loop: [one / many for one, many in zip(seconds[loop], seconds[stream])]
    pairs = {f"{stream} / {loop}": ratio(stream, loop) for stream in streams for loop in decode}
    return {
        "records_a_second": {name: 1 / statistics.median(each) for name, each in seconds.items()},
        "ratio": {name: statistics.median(each) for name, each in pairs.items()},
        "ratios": pairs,
    }


def tfds_decode(folder: str):
    """What a person writes: TFDS's random access, and Pillow."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(folder)
    records = builder.as_data_source("train", decoders={"image": tensorflow_datasets.decode.SkipDecoding()})

    def decode(index):
        record = records[index]
        with Image.open(io.BytesIO(record["image"])) as image:
            return np.asarray(image), int(record["label"])

    return decode


def experiment(folder: str, place: Path, backbone: str, batch: int, epochs: int = 1, side: int = SIDE, **overrides):
    """The experiment of a config that is written to `place`, streamed."""
    from topgap_jax import setup
    from topgap_jax.setup import assembly

    assembly.RESIDENT_BYTES = 0
    path = place / "config.py"
    path.write_text(CONFIG.format(folder=folder, side=side, backbone=backbone, batch=batch, epochs=epochs))
    return setup.experiment(path, list(overrides.items()))


class Enough(Exception):
    """All steps are made."""


def part_steps(folder: str, options) -> dict:
    from topgap_jax import setup
    from topgap_jax.run import fit as fit_module

    memory, every, make_step = {}, max(options.steps // 20, 1), fit_module.make_step

    def counted(parts, mesh):
        step, count = make_step(parts, mesh), 0

        def counting(*arguments):
            nonlocal count
            if count % every == 0:
                memory[count] = round(resident_mb(), 1)
            if count == options.steps:
                raise Enough
            count += 1
            return step(*arguments)

        return counting

    fit_module.make_step = counted
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(Enough):
        chosen = experiment(folder, Path(place), TINY, 16)
        fit_module.fit(chosen.config, Path(place) / "run", setup.parts(chosen))
    # The first tenth fills what malloc keeps: buffers of every size that the steps ask for.
    settled = [value for step, value in memory.items() if step >= options.steps // 10]
    return {
        "steps": options.steps,
        "batch": 16,
        "memory_mb": memory,
        "growth_mb": settled[-1] - settled[0],
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def part_fit(folder: str, options) -> dict:
    from topgap_jax import data, setup
    from topgap_jax.run import fit as fit_module
    from topgap_jax.run.cpu import configure_cpu

    configure_cpu(1)
    import bench_fit
    import jax

    probes, make_step, steps = [], fit_module.make_step, 12

    def probed(parts, mesh):
        probes.append(bench_fit.Probe(make_step(parts, mesh), steps, 6, 2 * options.rounds))
        return probes[0]

    fit_module.make_step = probed
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(bench_fit.Enough):
        chosen = experiment(folder, Path(place), "resnet20()", 128, augment="crop_flip()")
        fit_module.fit(chosen.config, Path(place) / "run", setup.parts(chosen))
    source, ids = opened(folder), np.random.default_rng(3).integers(0, RECORDS, 128 * steps).tolist()
    decoding = []
    for _ in range(2 * options.rounds):
        before = time.process_time()
        for index in ids:
            data.decode(source, index % len(source), (SIDE, SIDE), extras=False)
        decoding.append((time.process_time() - before) / steps)
    of = lambda pairs: statistics.median(cpu for _, cpu in pairs) / steps
    alone, loop = of(probes[0].alone), of(probes[0].loop)
    decode = statistics.median(decoding)
    return {
        "cpu_seconds_a_step": {"fit": loop, "step alone": alone, "decoding alone": decode},
        "ratio": (alone + decode) / loop,
        "backend": jax.default_backend(),
    }


def part_evaluate(folder: str, options) -> dict:
    """Peak of this process after evaluating `options.images` images."""
    from topgap_jax import setup
    from topgap_jax.setup import assembly

    with tempfile.TemporaryDirectory() as place:
        words = {"test": f"train[:{options.images}]", "train": ""}
        chosen = experiment(folder, Path(place), TINY, 128, side=64, **words)
        if not options.streamed:
            assembly.RESIDENT_BYTES = 2**40
        variables = assembly.init(chosen)
        loaded = setup.Loaded(chosen, variables, "fresh", None)
        setup.evaluate(loaded, evaluators="accuracy()")
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


def ask(part: str, folder: Path, options, **more) -> dict:
    """One part in a process of its own."""
    words = [sys.executable, __file__, "--part", part, "--folder", folder]
    words += ["--rounds", options.rounds, "--steps", options.steps, "--rate-rounds", options.rate_rounds]
    for name, value in more.items():
        words += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", value]
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def evaluations(folder: Path, options) -> dict:
    """Bytes by which the peak grows an image, over those of its pixels as they are given to the network."""
    few, many, side = 16_000, 64_000, 64  # below, what malloc keeps once and for all would count too
    answer = {}
    for name, streamed in (("held", False), ("streamed", True)):
        peak = lambda n, streamed=streamed: ask("evaluate", folder, options, images=n, streamed=streamed)["peak_mb"]
        peaks = [[peak(n) for n in (few, many)] for _ in range(3)]
        low, high = map(statistics.median, zip(*peaks))
        growth = (high - low) * 1e6 / (many - few) / (side * side * 3)
        answer[name] = {"images": [few, many], "peaks_mb": peaks, "bytes_a_pixel_byte": growth}
    return answer


def figures(parts: dict) -> dict[str, float]:
    """What is bounded, of the parts that were measured."""
    known = {}
    if "open" in parts:
        known |= {"opening, s": parts["open"]["seconds"], "opening, MB": parts["open"]["mb"]}
    if "resume" in parts:
        resumed = max(parts["resume"]["resumed_seconds"].values())
        known["resume over fresh start, s"] = resumed - parts["resume"]["fresh_seconds"]
    if "steps" in parts:
        known["growth over the steps, MB"] = parts["steps"]["growth_mb"]
    if "rate" in parts:
        small, large = (parts["rate"][str(side)]["ratio"] for side in (SIDE, LARGER))
        known["stream / a loop over TFDS's random access"] = small["stream / TFDS"]
        known["stream / a loop over ours"] = small["stream / ours"]
        known["stream with two processes / a loop over ours"] = small["stream with two processes / ours"]
        known["stream / a loop over ours, 256 x 256"] = large["stream / ours"]
    if "fit" in parts:
        known["alone / fit, CPU"] = parts["fit"]["ratio"]
    if "evaluate" in parts:
        known["evaluate, bytes a pixel byte"] = parts["evaluate"]["held"]["bytes_a_pixel_byte"]
        known["evaluate streamed, bytes a pixel byte"] = parts["evaluate"]["streamed"]["bytes_a_pixel_byte"]
    return known


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rate-rounds", type=int, default=41)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", help="where the set is made; given, it stays, and is taken where it is there")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--streamed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(globals()[f"part_{options.part}"](options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.folder) if options.folder else Path(place) / "records" / "1.0.0"
        if not (folder / "dataset_info.json").is_file():
            if shutil.disk_usage(place).free < FREE:
                parser.error(f"{FREE / 1e9:.0f} GB of disk are needed in {place}")
            print(f"{make(folder, options.records) / 1e9:.2f} GB written", file=sys.stderr)
        machine, parts = driver.machine(), stored_parts(options)
        for part in options.parts:
            measured = evaluations(folder, options) if part == "evaluate" else ask(part, folder, options)
            parts[part] = {"commit": machine["commit"], **measured}
            store(machine, options.records, parts)
    known = figures(parts)
    bound = lambda name: f"at {BOUNDS[name][1]} {BOUNDS[name][0]}"
    lines = [
        [name, f"{value:.3g}", bound(name), "yes" if keeps(name, value) else "no"] for name, value in known.items()
    ]
    print(driver.table(["", "measured", "bound", "kept"], lines))


def stored_parts(options) -> dict:
    """Those that are not measured now stay as they are in the result, if it is of as many records."""
    stored = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    parts = stored["parts"] if stored.get("records") == options.records else {}
    return {name: part for name, part in parts.items() if name not in options.parts}


def keeps(name: str, value: float) -> bool:
    bound, side = BOUNDS[name]
    return value <= bound if side == "most" else value >= bound


def store(machine: dict, records: int, parts: dict) -> None:
    """Write the result of the parts so far: one that is stopped loses none."""
    known = figures(parts)
    result = {"machine": machine, "load_average_after": driver.load_average(), "records": records, "parts": parts}
    kept = {name: keeps(name, value) for name, value in known.items()}
    driver.write("bench_records", result | {"figures": known, "kept": kept})


if __name__ == "__main__":
    main()
