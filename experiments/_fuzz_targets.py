"""What `fuzz_readers.py` gives odd bytes to: every reader of a file or a text that a stranger may have written.

The seeds are small valid inputs, mostly those of the tests; a change keeps the outer form of an input (JSON, zip, PNG),
so that what lies inside is reached. tests/test_fuzzed.py reads the inputs that are kept in tests/fuzzed.
"""

import contextlib
import io
import json
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.test_stored import CONFIG, ENTRY, EVALUATION
from tests.test_tfds import record, write_set
from tests.test_weight_files import legacy, tensor, zipped
from topgap_jax import data, pretrained
from topgap_jax.cli import texts
from topgap_jax.errors import UserError
from topgap_jax.measure import model_info
from topgap_jax.measure.log import Log
from topgap_jax.measure.robust import is_entry
from topgap_jax.mesh import data_mesh
from topgap_jax.progress import cut, read_metrics
from topgap_jax.report import attacked, index
from topgap_jax.report.compare import compare
from topgap_jax.report.page import embedded, report
from topgap_jax.run import manifest, workdir
from topgap_jax.run.divergence import sound_step
from topgap_jax.setup import checks, expressions, verify
from topgap_jax.setup import config as configs
from topgap_jax.setup.assembly import assemble
from topgap_jax.setup.tables import TABLE, VALUES

ROOT = Path(__file__).parent.parent
LONGEST_LINE = 500  # characters of an error on the terminal
SOMETIMES = 128  # one input in so many is also used for what takes long: a page, the shapes of a model

Mutate = Callable[[bytes], bytes]  # of the fuzzer: any change of bytes
Change = Callable[[bytes, Random, Mutate], bytes]


class Target(NamedTuple):
    """A reader. file: what the input is called, in a folder that `prepare` fills with what lies beside it; read(path);
    seeds(): small valid inputs; change: what keeps their outer form; None: bytes as they come."""

    file: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    change: Change | None = None
    prepare: Callable[[Path], object] = lambda folder: None


def outcome(target: Target, folder: Path, content: bytes) -> str:
    """The line with which the reader refuses an input, "" where it returns. Anything else that it raises goes through.

    folder: as `prepare` left it.
    """
    path, shown = folder / target.file, io.StringIO()
    path.write_bytes(content)
    try:
        with contextlib.redirect_stderr(shown):
            target.read(path)
    except UserError as error:
        line = texts.line(error)
        assert len(line) <= LONGEST_LINE + len(error.command), "a longer line"
        assert line.isprintable(), "control characters"
        return line
    assert "Traceback" not in shown.getvalue(), "a traceback on the terminal"
    return ""


def bytes_of(write: Callable[[Path], object], name: str) -> bytes:
    """What `write` writes into a file of that name."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write(folder / name)
        return (folder / name).read_bytes()


# Weights

ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.running_var": np.ones(2, np.float16)}


def weights(path: Path) -> None:
    pretrained.describe(path)
    pretrained.tensors(path)


def pytorch(write) -> Callable[[], list[bytes]]:
    tree = {
        "epoch": 3,
        "state_dict": {
            "module.a.weight": tensor("0", "FloatStorage", 12, 0, (3, 4), (1, 3)),
            "module.b.running_var": tensor("1", "HalfStorage", 2, 0, (2,), (1,)),
        },
    }
    storages = {"0": ARRAYS["a.weight"], "1": ARRAYS["b.running_var"]}
    return lambda: [bytes_of(lambda path: write(path, tree, storages), "w.pth")]


def with_hub(path: Path) -> None:
    weights(path.with_name("model.safetensors"))


def hub_seeds() -> list[bytes]:
    timm = {
        "architecture": "resnet50", "num_classes": 2, "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 1], "input_size": [3, 224, 224], "crop_pct": 0.875,
            "interpolation": "bicubic", "label_names": ["n01", "n02"], "label_descriptions": {"n01": "tench"},
        },
    }  # fmt: skip
    hugging_face = {"model_type": "resnet", "id2label": {"1": "goldfish", "0": "tench"}}
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 224}, "resample": 3}
    return as_bytes(timm, hugging_face, {**hugging_face, **preprocessor})


def beside_weights(folder: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "resnet"}')


# The files of a run

METRICS = [
    {"step": 1, "kind": "train", "epoch": 0.5, "loss": 1.5, "accuracy": 0.25},
    {"step": 2, "kind": "train", "epoch": 1.0, "loss": 1.25, "accuracy": 0.5},
    {"step": 2, "kind": "validation", "epoch": 1, "loss": 1.5, "accuracy": 0.25},
]
VERSIONS = {"command": "topgap train", "commit": "abc", "versions": {"jax": "0.10.2"}, "threads": 2, "mesh_devices": 1,
            "earlier": [{"commit": None, "versions": {"jax": "0.10.1"}}]}  # fmt: skip
HEADER = {"split": "test", "seed": 0}
SHEETS = {"sheets": {"test.png": 1893, "test-2.png": 4000000000}}
WHOLE = {**CONFIG["config"], "source": "shapes(train=60, validation=20, test=20)", "epochs": 2, "batch": 20,
         "optimizer": "sgd(cosine(0.01, 0, total_steps))", "image_size": [32, 32], "eps": 0.5,
         "backbone": "small_resnet(widths=(4,), stem=4, stem_kernel=3, stem_stride=4)", "pool": "top_gap(k=4)",
         "evaluators": "accuracy(), regions(fill=mean)", "explain": "cam(), grad_cam('stage1')"}  # fmt: skip
STORED = {"config": WHOLE, "file": "mine.py", "data": {"classes": ["a", "b", "c"], "examples": 60}}


def as_bytes(*trees) -> list[bytes]:
    return [json.dumps(tree).encode() for tree in trees]


def as_lines(rows) -> bytes:
    return b"".join(line + b"\n" for line in as_bytes(*rows))


def run_folder(folder: Path) -> None:
    (folder / "config.json").write_bytes(as_bytes(STORED)[0])
    (folder / "evaluation.json").write_bytes(as_bytes(EVALUATION)[0])
    (folder / "metrics.jsonl").write_bytes(as_lines(METRICS))
    (folder / "versions.json").write_bytes(as_bytes(VERSIONS)[0])


def sometimes(path: Path) -> bool:
    return zlib.crc32(path.read_bytes()) % SOMETIMES == 0


def shown(path: Path) -> None:
    """What `topgap compare` and `topgap report` make of the run that the file is of."""
    compare([path.parent])
    if sometimes(path):
        report([path.parent], path.parent / "report.html")


def config(path: Path) -> None:
    workdir.check(path.parent, STORED["config"], ("a", "b", "c"))
    shown(path)
    chosen = assemble(configs.load(path), workdir.learnt(path.parent))
    if sometimes(path):
        checks.model(chosen)


def metrics(path: Path) -> None:
    read_metrics(path.parent)
    sound_step(path.parent, 2, [1.5])
    shown(path)
    cut(path, 1)


def versions(path: Path) -> None:
    with mock.patch.object(workdir, "provenance", lambda: {"versions": {"jax": "0.10.2"}, "device": "cpu"}):
        workdir.record_versions(path.parent, data_mesh())
    shown(path)


def checkpoint_manifest(path: Path) -> None:
    manifest.damage(path.parent)


def checkpoint_folder(folder: Path) -> None:
    (folder / "a").write_bytes(b"12345")


def manifest_seeds() -> list[bytes]:
    return as_bytes({"files": {"a": [5, zlib.crc32(b"12345")]}}, {"files": {}})


def attack_log(path: Path) -> None:
    """What `measure.robust` asks of the entries; each line with its checksum, as a stranger can write it."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(b"%08x %s" % (zlib.crc32(line.removesuffix(b"\n")), line) for line in lines))
    for entry in Log(path, HEADER).entries:
        if not is_entry(entry, 3):
            continue
        ended, numbers = np.array(entry["ended"], bool), np.array(entry["run"], int) + 1
        assert len(entry["ids"]) == len(ended) == len(numbers)
        sum(entry["steps"]) + entry["seconds"] + entry["slot_steps"] + entry["unconfirmed"] + entry["phase"]
        assert all(len(entry[name]) == len(ended) for name in ("radius", "margin", "predicted", "fragile", "broken"))


def adversarial(path: Path) -> None:
    """What the report draws of it; what it cannot read it leaves out."""
    examples = attacked.read(path)
    if examples is not None:
        attacked.picture(examples, ("a", "b"))


def adversarial_seeds() -> list[bytes]:
    images = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    columns = {"attack": np.int32([0, -1]), "label": np.int32([0, 1]), "predicted": np.int32([1, 1])}
    columns |= {"step": np.int32([2, -1]), "clean": images, "adversarial": images[::-1]}
    about = {"split": "test", "evaluator": "robust()", "weights": "checkpoint best, step 3"}
    ways = (np.savez, np.savez_compressed)
    return [bytes_of(lambda path, save=save: save(path, **columns, **about), "a.npz") for save in ways]


@cache
def model_seeds() -> list[bytes]:
    stored = json.loads((ROOT / "results" / "models" / "Wang2021BetaCROWN_R4B.json").read_text())
    stored["images"] = {name: {key: text[:20] for key, text in each.items()} for name, each in stored["images"].items()}
    stored["rows"] = [{**row, "examples": 20} for row in stored["rows"]]
    stored["config"] |= {"source": WHOLE["source"]}
    return as_bytes(stored)


def model(path: Path) -> None:
    model_info.by_hand(path)
    info = model_info.read(path)
    with contextlib.suppress(UserError):
        if info.keys["weights"] is not None:  # then they must be given
            verify._where(path, info)
    none = {text: {name: values[:0] for name, values in each.items()} for text, each in info.images.items()}
    model_info.compare(info, np.arange(0), none)
    if sometimes(path):
        verify._experiment(path, info, None, None)


# Data

SET = Path("tiny") / "1.0.0"


def tfds_set(path: Path) -> None:
    source = data.tfds(str(path.parent), box="bbox", region="mask")("train")
    for place in range(min(3, len(source))):
        data.decode(source, place, (8, 8))


@cache
def set_files() -> dict[str, bytes]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        written = write_set(folder, {"train": [record(i) for i in range(3)]})
        return {path.name: path.read_bytes() for path in written.iterdir()}


def set_folder(folder: Path) -> None:
    (folder / SET).mkdir(parents=True)
    for name, content in set_files().items():
        (folder / SET / name).write_bytes(content)


def of_set(name: str, change: Change | None = None) -> Target:
    return Target(str(SET / name), tfds_set, lambda: [set_files()[name]], change, set_folder)


def picture(path: Path) -> None:
    data.decode(data.pictures(str(path)), 0, (8, 8), "crop")


def sheet(path: Path) -> None:
    embedded(path)


def picture_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels.astype(np.uint16)[..., 0] * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    kinds = [
        (image, "PNG", {}), (image.convert("RGBA"), "PNG", {}), (image.quantize(8), "PNG", {"transparency": 0}),
        (grey, "PNG", {}), (image.convert("1"), "PNG", {}), (image, "JPEG", {"exif": exif}),
        (image.convert("CMYK"), "JPEG", {}), (image, "GIF", {"save_all": True, "append_images": [image.convert("L")]}),
        (image, "BMP", {}), (image.quantize(8), "BMP", {}), (image, "TIFF", {}),
        (image, "TIFF", {"compression": "tiff_lzw"}), (grey, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (image, "WEBP", {"lossless": True}), (image.convert("RGBA"), "WEBP", {}), (image, "AVIF", {}),
    ]  # fmt: skip
    seeds = []
    for each, form, options in kinds:
        stream = io.BytesIO()
        with contextlib.suppress(KeyError, OSError):  # a format that this Pillow does not write
            each.save(stream, form, **options)
            seeds.append(stream.getvalue())
    return seeds


# Texts

LISTS = ("evaluators", "augment", "explain", "test")
CONTEXT = {"classes": 3, "total_steps": 6, "references": lambda: np.zeros((2, 8, 8, 3), np.float32)}


def text(path: Path) -> None:
    """KEY, then its text: what `--config.KEY=TEXT` does. Texts that name a folder of the disk are left out."""
    key, _, words = path.read_bytes().decode("utf-8", "surrogateescape").partition("\n")
    if any(name in words for name in ("folder", "tfds")):
        return
    config = configs.load(path.with_name("config.json"), [(key, words)]).config
    if key in LISTS:
        expressions.choices(config, key, {}, **CONTEXT)
    elif configs.is_expression(config, key):
        expressions.choice(config, key, {}, **CONTEXT)


def text_seeds() -> list[bytes]:
    pairs = [(key, str(value)) for key, value in WHOLE.items()]
    pairs += [
        ("model", "with_drop(network, 'stage1', sgdrop(rate=.1))"), ("model", "with_pool(network, dense='head')"),
        ("augment", "crop_flip(), mixup(.2), cutmix()"), ("objective", "adversarial(pgd(linf(8/255), steps=2))"),
        ("evaluators", "robust(autoattack(linf(eps))), audit(linf(eps)), curve(fgsm(linf(eps)), eps=(1/255, 2/255))"),
        ("evaluators", "localisation(cam(), boxes=False), measures(rise(masks=4), deletion(), gini())"),
        ("explain", "integrated(steps=4, rules=guided), rise(masks=8), smooth(gradient(), samples=2), lime()"),
        ("optimizer", "adamw(warmup_cosine(.001, 3, total_steps), weight_decay=1e-4)"), ("seed", "7"),
        ("image_size", "(16, 16)"), ("std", "(1e-3, .5, 1)"), ("dtype", "bfloat16"), ("test", "test[:5], train"),
        ("drop", "1"), ("pool", "lse(r=-1e9 * 2 // 3 % 5)"), ("head", "pyramid_head(pool, width=8)"),
    ]  # fmt: skip
    return [f"{key}\n{words}".encode() for key, words in pairs]


def words() -> list[str]:
    """What texts are made of."""
    return [*TABLE, *VALUES, *configs.KEYS, "=", "(", "),", "**", "lambda:", "[", "]", "'", '"', "1e999", "-1", "None"]


# Changes that keep the outer form

ODD = (
    10**400, 1e308, -1, 0, 2**63, 2**31, 0.5, True, None, "", "x" * 600, "\ud800", "\x1b[31m", "\x00", "../../x", [],
    {}, [[]], {"": {}}, "NaN", [0] * 9, "a[0]", 1e-320,
)  # fmt: skip


def places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*at, key))


def replaced(tree, at, change):
    """The tree with `change` of what stands at a place."""
    if not at:
        return change(tree)
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    tree[at[0]] = replaced(tree[at[0]], at[1:], change)
    return tree


def without(value, key):
    return {each: value[each] for each in value if each != key} if isinstance(value, dict) else value[:-1]


def json_change(content: bytes, draw: Random, mutate: Mutate) -> bytes:
    """A value of a JSON text (of one of its lines) exchanged for an odd one or one from elsewhere in it, or removed."""
    lines = content.split(b"\n")
    row = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[row])
        every = list(places(tree))
        at, other = draw.choice(every), draw.choice(every)
        if draw.random() < 0.2 and at:
            tree = replaced(tree, at[:-1], lambda each: without(each, at[-1]))
        elif draw.random() < 0.3:
            value = tree
            for key in other:
                value = value[key]
            tree = replaced(tree, at, lambda _: value)
        elif draw.random() < 0.3:
            changed = lambda each: mutate(str(each).encode("utf-8", "replace")).decode("utf-8", "replace")
            tree = replaced(tree, at, changed)
        else:
            tree = replaced(tree, at, lambda _: draw.choice(ODD))
        lines[row] = json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return mutate(content)
    return b"\n".join(lines)


def zip_change(content: bytes, draw: Random, mutate: Mutate) -> bytes:
    """A member of a zip changed, renamed, doubled or removed, and written with its right checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
        place = draw.randrange(len(members))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for number, (info, each) in enumerate(members):
                name, kind = info.filename, info.compress_type
                if number == place:
                    match draw.randrange(8):
                        case 0:
                            name = mutate(name.encode()).decode("utf-8", "replace")
                        case 1:
                            continue
                        case 2:
                            kind = zipfile.ZIP_STORED if kind else zipfile.ZIP_DEFLATED
                        case _:
                            each = mutate(each)
                archive.writestr(zipfile.ZipInfo(name), each, kind)
        return stream.getvalue()
    except Exception:  # it is no zip any more
        return mutate(content)


def png_change(content: bytes, draw: Random, mutate: Mutate) -> bytes:
    """A chunk of a PNG changed, with its right checksum; other formats as bytes."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return mutate(content)
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return mutate(content)
    place = draw.randrange(len(chunks))
    kind, body = chunks[place]
    if kind == b"IDAT" and draw.random() < 0.5:
        with contextlib.suppress(zlib.error):
            body = zlib.compress(mutate(zlib.decompress(body)))
    else:
        body = mutate(body)
    chunks[place] = (kind, body)
    size = lambda number: struct.pack(">I", number)
    whole = (size(len(body)) + kind + body + size(zlib.crc32(kind + body)) for kind, body in chunks)
    return content[:8] + b"".join(whole)


def npz_seeds() -> list[bytes]:
    return [bytes_of(lambda path, save=save: save(path, **ARRAYS), "w.npz") for save in (np.savez, np.savez_compressed)]


def safetensors_seeds() -> list[bytes]:
    return [bytes_of(lambda path: save_file(ARRAYS, path, {"mean": "0.5,0.5,0.5"}), "w.safetensors")]


def fresh(target: Target, folder: Path) -> Path:
    """An empty folder for an input, with what lies beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.prepare(folder)
    return folder


TARGETS = {
    "safetensors": Target("w.safetensors", weights, safetensors_seeds),
    "npz": Target("w.npz", weights, npz_seeds, zip_change),
    "pth_zip": Target("w.pth", weights, pytorch(zipped), zip_change),
    "pth_legacy": Target("w.bin", weights, pytorch(legacy)),
    "hub_config": Target("config.json", with_hub, hub_seeds, json_change, beside_weights),
    "hub_preprocessor": Target("preprocessor_config.json", with_hub, hub_seeds, json_change, beside_weights),
    "config": Target("config.json", config, lambda: as_bytes(STORED, CONFIG), json_change, run_folder),
    "evaluation": Target("evaluation.json", shown, lambda: as_bytes(EVALUATION), json_change, run_folder),
    "metrics": Target("metrics.jsonl", metrics, lambda: [as_lines(METRICS)], json_change, run_folder),
    "versions": Target("versions.json", versions, lambda: as_bytes(VERSIONS), json_change, run_folder),
    "manifest": Target("manifest.json", checkpoint_manifest, manifest_seeds, json_change, checkpoint_folder),
    "attack_log": Target("attack-0.jsonl", attack_log, lambda: [as_lines([HEADER, ENTRY, ENTRY])], json_change),
    "adversarial": Target("a.npz", adversarial, adversarial_seeds, zip_change),
    "model": Target("model.json", model, model_seeds, json_change),
    "sheet": Target("sheet.png", sheet, picture_seeds, png_change),
    "sheets": Target("sheets.json", lambda path: index.noted(path.parent), lambda: as_bytes(SHEETS), json_change),
    "tfds_features": of_set("features.json", json_change),
    "tfds_info": of_set("dataset_info.json", json_change),
    "tfds_labels": of_set("label.labels.txt"),
    "tfds_records": of_set("tiny-train.array_record-00000-of-00001"),
    "picture": Target("picture.png", picture, picture_seeds, png_change),
    "text": Target("text", text, text_seeds, None, run_folder),
}  # fmt: skip
"""Every reader by its name."""
