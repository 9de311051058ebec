"""The command line as a user meets it: each command from start to end, and one line and exit code 2 for a mistake."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import topgap_jax
from tests.test_setup import store
from topgap_jax import cli, engine, setup
from topgap_jax.errors import UserError
from topgap_jax.measure import results
from topgap_jax.mesh import data_mesh
from topgap_jax.progress import read_metrics
from topgap_jax.report import index, read_runs
from topgap_jax.run import checkpoint
from topgap_jax.run import fit as fit_module
from topgap_jax.run.provenance import provenance
from topgap_jax.run.stopping import stop_requests
from topgap_jax.setup import assembly

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).parent / "tiny_config.py")
NAMES = ("loss", "accuracy")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """One device of the eight that tests have: 20 examples cannot be split over eight; and memory as pytest has it."""
    patch(monkeypatch)


def patch(monkeypatch):
    for module in (fit_module, assembly, setup.commands):
        monkeypatch.setattr(module, "data_mesh", lambda: data_mesh(jax.devices()[:1]))
    monkeypatch.setattr(cli.commands, "configure", lambda arguments: "CPU: as it is")


def topgap(*words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def program(*words, **options) -> subprocess.Popen:
    """The command as a program of its own, on one device, as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "-m", "topgap_jax", *map(str, words)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT, **options
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that `topgap train` made: (folder, stdout, stderr)."""
    workdir = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        code, out, err = topgap("train", "--config", TINY, "--workdir", workdir)
    assert code == 0, err
    return workdir, out, err


@pytest.fixture
def run(trained, tmp_path_factory):
    """A copy of it for each test, which may write there."""
    workdir, out, err = trained
    return shutil.copytree(workdir, tmp_path_factory.mktemp("cli") / "run"), out, err


def test_train_tells_what_it_does_and_shows_the_results(run):
    workdir, out, err = run
    lines = [re.sub(r": 100%.*", "", line) for line in err.splitlines()]
    assert lines == [
        f"CPU: as it is; {engine.status()}",
        "reading shapes() train",
        "reading shapes() validation",
        "training",
        "reading shapes() test",
        "test accuracy()",
        "test regions(fill=mean)",
    ]
    assert "epoch 2/2, loss " in err
    assert re.match(
        r"shapes\(train=60, validation=20, test=20\), checkpoint best, step [36]\n\n +value +images +forwards", out
    )
    assert re.search(r"^test: accuracy\(\)\n  accuracy  +\d\.?\d* \[.*\]  +20 +1 +0 ", out, re.M)
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints", "config.json", "evaluation.json", "evaluation.lock", "lock", "metrics.jsonl", "tensorboard",
        "versions.json",
    }  # fmt: skip
    assert json.loads((workdir / "config.json").read_text())["file"] == TINY


def test_train_again_does_nothing_and_shows_the_results(run):
    workdir, out, _ = run
    content = lambda: {
        path: path.read_bytes() for path in sorted(workdir.glob("*.json*")) if path.name != "versions.json"
    }
    before = content()
    code, again, err = topgap("train", "--config", TINY, "--workdir", workdir)
    assert (code, again) == (0, out) and "test accuracy()" not in err
    assert content() == before


def test_evaluate_adds_rows_to_a_run(run):
    workdir, _, _ = run
    words = ("--split", "test[:5], validation[:5]", "--evaluators", "accuracy(), robust(fgsm(linf(eps)))")
    code, out, err = topgap("evaluate", "--workdir", workdir, *words, "--config.eps=4/255", "--batch", 5)
    assert code == 0 and err.count("reading") == 2
    assert "\ntest[:5]: robust(fgsm(linf(eps))) with eps=4/255\n  accuracy under fgsm, linf(4/255)  " in out
    assert "\nrobust(fgsm(linf(eps))) with eps=4/255 on test[:5]: not audited; not measured beside it: " in out
    rows = json.loads((workdir / "evaluation.json").read_text())["rows"]
    assert [(row["split"], row["evaluator"], row["overrides"], row["examples"]) for row in rows] == [
        ("test", "accuracy()", {}, 20),
        ("test", "regions(fill=mean)", {}, 20),
        ("test[:5]", "accuracy()", {}, 5),
        ("test[:5]", "robust(fgsm(linf(eps)))", {"eps": "4/255"}, 5),
        ("validation[:5]", "accuracy()", {}, 5),
        ("validation[:5]", "robust(fgsm(linf(eps)))", {"eps": "4/255"}, 5),
    ]


def test_evaluate_saves_adversarial_images(run, tmp_path):
    """Of a run, and of weights without one: the same command, a row printed, a file for each attack."""
    workdir, _, _ = run
    words = ("--split", "test[:5]", "--evaluators", "curve(fgsm(linf(eps)), eps=(1/255, 64/255))", "--batch", 5)
    of_run = ("--workdir", workdir, "--save", tmp_path / "a")
    of_weights = ("--config", TINY, "--weights", workdir, "--save", tmp_path / "b.npz")
    outs = [topgap("evaluate", *words, *which) for which in (of_run, of_weights)]
    assert [code for code, _, _ in outs] == [0, 0]
    assert all("accuracy at linf(1/255)" in out and "accuracy at linf(64/255)" in out for _, out, _ in outs)
    assert all("not audited" in out for _, out, _ in outs)
    assert read_runs([workdir])[0].faults == ()
    (file,) = (tmp_path / "a").iterdir()
    assert file.name == "test_5_curve_fgsm_linf_eps_eps_1_255_64_255.npz"
    with np.load(file) as ours, np.load(tmp_path / "b.npz") as other:
        for name in ("id", "adversarial", "radius", "predicted", "label"):
            np.testing.assert_array_equal(ours[name], other[name])
        assert ours["adversarial"].shape == (5, 32, 32, 3)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == []


def test_explain_draws_a_split_and_a_folder(run, tmp_path):
    workdir, _, _ = run
    code, out, _ = topgap("explain", "--workdir", workdir, "--count", 2)
    assert (code, out) == (0, f"{workdir}/sheets/test.png: 2 of 20 pictures\n")
    assert list(index.noted(workdir / "sheets")) == ["test.png"]
    with Image.open(workdir / "sheets" / "test.png") as two:
        two.load()
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 60, 3)), ("b.jpg", (30, 20, 3)), ("c.JPEG", (64, 64)), ("notes.txt", None)):
        if shape is None:
            (pictures / name).write_text("no picture")
        else:
            Image.fromarray(random.integers(0, 256, shape).astype(np.uint8)).save(pictures / name)
    words = ("--images", pictures, "--methods", "cam()", "--out", tmp_path / "out")
    code, out, _ = topgap("explain", "--workdir", workdir, *words)
    assert (code, out) == (0, f"{tmp_path}/out/my_pictures.png: 3 of 3 pictures\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my_pictures.png"]
    with Image.open(tmp_path / "out" / "my_pictures.png") as three:
        assert three.height > two.height and three.width < two.width, "one row a picture, one column a method"


def test_explain_keeps_maps_names_what_it_cannot_read_and_overwrites_nothing(run, tmp_path, monkeypatch):
    """Grey, RGBA, 16 bits, odd sizes, a broken file: all others are explained, on pages, and the exit code tells."""
    workdir, _, _ = run
    pictures = tmp_path / "bilder"
    pictures.mkdir()
    random = np.random.default_rng(0)
    shapes = {"grey.png": (40, 60), "rgba.png": (33, 47, 4), "deep.png": (20, 31), "名前.png": (50, 20, 3)}
    for name, shape in shapes.items():
        kind = np.uint16 if name == "deep.png" else np.uint8
        Image.fromarray(random.integers(0, 256, shape).astype(kind)).save(pictures / name)
    (pictures / "broken.png").write_bytes((pictures / "grey.png").read_bytes()[:300])
    monkeypatch.setattr("topgap_jax.setup.pictures.ROWS", 3)
    words = ("--workdir", workdir, "--images", pictures, "--count", "all", "--target", "1", "--channels")
    words += ("--methods", "cam(), smooth(gradient(reduce='sum'), samples=2)", "--save", tmp_path / "maps.npz")
    code, out, err = topgap("explain", *words, "--out", tmp_path / "out", "--overlays", tmp_path / "single")
    assert code == 1 and err.count("left out: ") == 1 and "broken.png" in err
    sheets = [tmp_path / "out" / f"bilder_00{i}.png" for i in (1, 2)]
    assert out.splitlines() == [
        f"{sheets[0]}: 3 of 5 pictures", f"{sheets[1]}: 1 of 5 pictures", f"{tmp_path}/maps.npz: the maps of 4 pictures"
    ]  # fmt: skip
    assert len(list((tmp_path / "single").glob("*.png"))) == 8 and (tmp_path / "single" / "名前_cam.png").is_file()
    with np.load(tmp_path / "maps.npz") as stored:
        assert stored["cam()"].shape == (4, 8, 8) and sorted(stored["file"]) == sorted(shapes)
        channels = stored["smooth(gradient(reduce='sum'), samples=2) | channels"]
        np.testing.assert_allclose(
            channels.sum(-1), stored["smooth(gradient(reduce='sum'), samples=2)"], rtol=1e-5, atol=1e-7
        )
        assert (stored["target"] == 1).all() and (stored["target_probability"] <= stored["probability"] + 1e-6).all()
        assert len(stored["classes"]) == 6 and stored["id"].tolist() == [1, 2, 3, 4]
    assert list(tmp_path.glob(".maps*")) == []
    before = sheets[0].read_bytes()
    code, out, _ = topgap("explain", *words[:8], "--methods", "cam()", "--out", tmp_path / "out")
    assert sheets[0].read_bytes() == before and out.splitlines()[0].startswith(f"{tmp_path}/out/bilder_001-2.png")
    for again in (("--out", sheets[0]), ("--out", tmp_path / "out", "--save", tmp_path / "maps.npz")):
        code, _, err = topgap("explain", *words[:8], "--methods", "cam()", *again)
        assert code == 2 and "is there already" in err


def test_layers_have_the_shapes_of_the_configs_image_size(run):
    code, out, _ = topgap("layers", "--config", TINY, "--config.image_size=(64, 48)")
    assert code == 0
    head, line, *rows = out.splitlines()
    assert head.split() == ["layer", "shape"] and set(line) == {"-"}
    assert re.split("  +", rows[0]) == ["backbone/stem/conv", "16 x 12 x 4"]
    assert [re.split("  +", row) for row in rows if "grad_cam" in row] == [
        ["backbone/stage1", "16 x 12 x 4", "the default of grad_cam()"]
    ]
    assert topgap("layers", "--workdir", run[0])[1].count("8 x 8 x 4") > 3


def test_compare_and_report(run, tmp_path):
    code, out, _ = topgap("compare", run[0])
    assert code == 0 and re.search(r"^test: regions\(fill=mean\)\n  foreground sensitivity  ", out, re.M)
    code, out, _ = topgap("report", run[0], "--out", tmp_path / "page.html")
    assert (code, out) == (0, f"{tmp_path / 'page.html'}\n")
    assert "foreground sensitivity" in (tmp_path / "page.html").read_text().lower()


def test_evaluate_weights_of_a_file(tmp_path):
    variables = assembly.init(setup.experiment(TINY))
    store(tmp_path / "net.safetensors", variables, {})
    words = ("--weights", tmp_path / "net.safetensors", "--evaluators", "accuracy()")
    code, out, _ = topgap("evaluate", "--config", TINY, *words)
    assert code == 0 and out.startswith("shapes(train=60, validation=20, test=20), net.safetensors\n")
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.slow
def test_public_weights_on_real_images(topgap_data):
    weights = topgap_data / "weights" / "resnet20_cifar10.safetensors"
    words = ("--split", "test[:200]", "--evaluators", "accuracy()", "--batch", 100)
    code, out, _ = topgap("evaluate", "--config", ROOT / "configs" / "cifar10.py", "--weights", weights, *words)
    accuracy = re.search(r"^test\[:200\]: accuracy\(\)\n  accuracy +(\S+) ", out, re.M)
    assert code == 0 and 0.87 < float(accuracy[1]) < 0.97


def test_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = topgap("help")
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    assert re.search(r"^  top_gap  +Mean of the k largest positions of every class map", out, re.M)
    assert re.search(r"^  with_pool  +The classifier with `pool` over class maps", out, re.M)
    assert re.search(r"^  margin  +\S", out, re.M)
    assert topgap("help", "pgd")[1].startswith(
        "pgd(ball, *, score=cross_entropy, steps=20, step_size=None, start='random', optimizer=None, targets=0, "
        "restarts=1, samples=None)\n\nProjected "
    )
    assert topgap("help", "margin")[1].startswith("margin\n\nmax over k != y")
    rules = topgap("help", "guided")[1]
    assert rules.startswith("guided\n\nGuided non-linearity of ReLU and max pooling")
    assert "\nrelu backward: [phi'(z) g]_+" in rules and "\nmax_pool backward: [g]_+ sent to" in rules
    code, out, _ = topgap("help", "config")
    assert code == 0 and re.search(
        r"^  epochs  +a whole number of at least 1: passes over the training split; must be stated$", out, re.M
    )
    assert re.search(r"^  pool  +an expression: class maps to logits \(pools\); default 'gap\(\)'$", out, re.M)


def test_help_of_what_one_calls_in_a_program_and_of_commands():
    listed = topgap("help")[1]
    for name in (
        "bind",
        "fast",
        "with_rules",
        "read",
        "tap",
        "layers",
        "fused",
        "fast_convs",
        "fold_batch_norm",
        "attack",
    ):
        assert re.search(rf"^  {name}  +\S", listed, re.M)
    assert topgap("help", "bind")[1].startswith(
        "bind(model, variables, *, train=False, step=None)\n\nThe model with its "
    )
    assert topgap("help", "robust")[1].startswith(
        "robust(*runs)\n\nAccuracy under attack: the share of examples that none"
    )
    assert topgap("help", "train")[1].startswith("usage: topgap train ") and "--arm NAME" in topgap("help", "train")[1]
    both = topgap("help", "layers")[1]
    assert both.startswith("usage: topgap layers ") and "\nIn Python:\n\nlayers(f, *args" in both


def test_topgap_alone_is_its_help_and_it_knows_its_version():
    for words, start in (((), "usage: topgap [-h]"), (("--version",), f"topgap {topgap_jax.__version__}\n")):
        out = io.StringIO()
        with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(out):
            cli.main(list(words))
        assert end.value.code == 0 and out.getvalue().startswith(start)


def test_help_and_compare_import_little():
    """Seconds that nobody should wait for: data sets, checkpoints, figures, and for `compare` Flax."""
    heavy = ["tensorflow_datasets", "orbax", "grain", "matplotlib", "tensorboardX", "flax.nnx", "scipy.ndimage"]
    for words, names in ((["help", "pgd"], heavy), (["compare", "nowhere"], [*heavy, "flax", "optax", "scipy"])):
        code = (
            f"import sys; from topgap_jax.cli import main; main({words}); print([n for n in {names} if n in"
            " sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_a_home_folder_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    line = "--config=~/mine.py --workdir=~/runs/a".split()
    arguments, _ = cli._parse(["train", *line])
    assert (arguments.config, arguments.workdir) == (f"{tmp_path}/mine.py", f"{tmp_path}/runs/a")
    arguments, _ = cli._parse("explain --config ~/mine.py --weights=~/w.npz --images=~/holiday --out=~/sheets".split())
    assert {arguments.weights, arguments.images, arguments.out} == {
        f"{tmp_path}/{x}" for x in ("w.npz", "holiday", "sheets")
    }
    assert cli._parse(["compare", "~/a"])[0].workdirs == [f"{tmp_path}/a"]


def test_a_terminal_without_a_letter_gets_another(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=lambda *_: print("±1 é")))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["help"]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"?1 ?\n"


def test_a_platform_that_is_not_there(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    process = program("layers", "--config", TINY)
    out, err = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("there is a GPU here")
    assert (process.returncode, out) == (2, "")
    assert err.startswith("topgap: JAX_PLATFORMS=cuda: JAX cannot use it here (") and err.count("\n") == 1


FAULTS = {
    (errno.ENOSPC, "metrics.jsonl"): "No space left on device, writing 'metrics.jsonl'; make room, then give the same ",
    (errno.EDQUOT, None): "Disk quota exceeded; make room, then give the same command again",
    (errno.EROFS, "runs/a"): "Read-only file system: 'runs/a'",
    (errno.ENAMETOOLONG, "a" * 300): f"File name too long: '{'a' * 300}'",
    (errno.EIO, "checkpoint"): "Input/output error: 'checkpoint'",
    (errno.ESTALE, "config.json"): "Stale file handle: 'config.json'",
}


@pytest.mark.parametrize(("number", "name"), FAULTS)
def test_what_the_system_refuses_is_one_line(number, name, monkeypatch):
    def work(arguments, overrides):
        raise OSError(number, os.strerror(number), *([name] if name else []))

    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=work))
    code, out, err = topgap("help")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"topgap: {FAULTS[number, name]}")
    with pytest.raises(OSError):
        topgap("help", "--traceback")


@pytest.fixture
def disk(tmp_path):
    """(folder on a disk of its own, options -> its size or mode changed); skipped where nothing may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = lambda options: subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
    )
    if mount("size=64k").returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield folder, lambda options: mount(f"remount,{options}").check_returncode()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 8, 12, 16, 64, 1024, 15660, 15720])
def test_a_disk_that_fills_loses_nothing(kilobytes, trained, disk):
    """At whatever place: one line, exit code 2, and with room the same command ends with the same weights."""
    folder, change = disk
    change(f"size={kilobytes}k")
    words = ("train", "--config", TINY, "--workdir", folder / "run")
    code, out, err = topgap(*words)
    said = [
        line
        for line in err.splitlines()
        if not re.match("CPU: |reading |training: |test |topgap: .* read uncheck", line)
    ]
    assert (code, len(said)) == (2, 1), err
    assert re.search("No space left|are free on that disk", said[0]), err
    change("size=100m")
    assert topgap(*words)[0] == 0
    expected, found = (checkpoint.stored(path, "last", "variables") for path in (trained[0], folder / "run"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    change("ro")
    for line in (
        words,
        ("evaluate", "--workdir", folder / "run", "--again"),
        ("explain", "--workdir", folder / "run", "--count", 1),
        ("report", folder / "run"),
    ):
        code, _, err = topgap(*line)
        said = [text for text in err.splitlines() if not re.match("CPU: |reading ", text)]
        assert (code, len(said)) == (2, 1) and said[0].endswith(": Read-only file system"), err
    assert topgap("evaluate", "--workdir", folder / "run")[0] == topgap("compare", folder / "run")[0] == 0


def test_paths_that_no_system_has(run, tmp_path):
    """Too long, or with a NUL: one line, and nothing written."""
    long = "a" * 5000
    for words in (
        ("train", "--config", TINY, "--workdir", tmp_path / long),
        ("train", "--config", long, "--workdir", tmp_path / "new"),
        ("train", "--config", TINY, f"--config.init={long}.npz", "--workdir", tmp_path / "new"),
        ("train", "--config", TINY, f"--config.source=folder('{long}')", "--workdir", tmp_path / "new"),
        ("evaluate", "--workdir", long),
        ("evaluate", "--config", TINY, "--weights", long),
        ("explain", "--workdir", run[0], "--images", long),
        ("explain", "--workdir", run[0], "--count", 1, "--out", tmp_path / long),
        ("report", run[0], "--out", tmp_path / long),
        ("compare", long),
        ("verify", long),
    ):
        code, _, err = topgap(*words)
        lines = [line for line in err.splitlines() if not re.match("CPU: |reading ", line)]
        assert code == 2 and len(lines) == 1 and "File name too long" in lines[0] and len(lines[0]) < 550, (words, err)
    code, out, err = topgap("train", "--config", TINY, "--workdir", "a\0b")
    assert (code, out) == (2, "")
    assert err == "topgap: the argument 'a\\x00b' holds a character NUL, which no path and no text may\n"
    code, _, err = topgap("train", "--config", TINY, r"--config.source=folder('a\0b')", "--workdir", tmp_path / "new")
    line = "topgap: config.source: 'a\\x00b' holds a character NUL, which no path and no name may"
    assert code == 2 and err.splitlines()[1:] == [line]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_printed_is_said_when_the_work_is_done(monkeypatch):
    """`topgap compare > /dev/full`, or a disk that is full: the work is done, and the exit code is not 0."""
    done = []

    def work(arguments, overrides):
        print("x" * 100_000, flush=True)
        done.append(True)

    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=work))
    err = io.StringIO()
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), contextlib.redirect_stderr(err):
        code = cli.main(["help"])
    line = "topgap: what was to be printed could not be written: No space left on device\n"
    assert (code, err.getvalue(), done) == (2, line, [True])


def test_a_device_is_written_to_and_stays_one(run):
    code, out, err = topgap("report", run[0], "--out", "/dev/full")
    assert (code, out) == (2, "") and err == "topgap: cannot write the report '/dev/full': No space left on device\n"
    assert Path("/dev/full").is_char_device() and not Path("/dev/full.part").exists()
    assert topgap("report", run[0], "--out", "/dev/null")[0] == 0 and Path("/dev/null").is_char_device()


def test_a_compilation_cache_that_is_full_or_damaged_is_one_line(tmp_path, monkeypatch):
    """And what it has of that program goes: an entry that was cut short would be met again each time."""
    for name in ("jit_a-1-cache", "jit_a-2-cache", "jit_b-1-cache"):
        (tmp_path / name).touch()
    before = jax.config.jax_compilation_cache_dir

    def work(arguments, overrides):
        warnings.simplefilter("always")
        for name in ("jit_a", "jit_c"):
            text = f"Error writing persistent compilation cache entry for '{name}': OSError: [Errno 28] No space left"
            warnings.warn(text, stacklevel=1)
        warnings.warn("Error reading persistent compilation cache entry for 'jit_d': EOFError: \n", stacklevel=1)

    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=work))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        answer = topgap("help")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert answer == (
        0,
        "",
        f"topgap: writing the compilation cache {tmp_path}: OSError: [Errno 28] No space left; what it cannot take is "
        f"compiled anew each time\ntopgap: reading the compilation cache {tmp_path}: EOFError:; compiled anew\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["jit_b-1-cache"]


def test_the_command_is_stored_as_a_shell_takes_it(monkeypatch):
    words = ["/usr/bin/topgap", "train", "--config.pool=top_gap(k = 4)", "--workdir", "/home/me/runs/a b"]
    monkeypatch.setattr(sys, "argv", words)
    command = provenance()["command"]
    assert shlex.split(command) == ["topgap", "train", "--config.pool=top_gap(k = 4)", "--workdir", "a b"]


def test_a_mistake_leaves_a_workdir_that_takes_the_correction(run, tmp_path):
    """What is looked at may change when a run is taken up again, config.json follows; what decides the weights may
    not."""
    workdir = shutil.copytree(run[0], tmp_path / "again")
    train = ("train", "--config", TINY, "--workdir", workdir)
    for mistake in ("test=tset", "evaluators=regions(bnk)", "explain=grad_cam('nope')"):
        code, _, err = topgap(*train, f"--config.{mistake}")
        assert code == 2 and "training" not in err and "reading" not in err
    assert topgap(*train, "--config.evaluators=accuracy()", "--config.test=validation", "--config.log_every=3")[0] == 0
    stored = json.loads((workdir / "config.json").read_text())["config"]
    assert (stored["evaluators"], stored["test"], stored["log_every"]) == ("accuracy()", "validation", 3)
    code, _, err = topgap(*train, "--config.seed=7")
    assert code == 2 and "seed is 0 there and 7 here" in err and "reading" not in err


def test_the_advice_for_a_diverged_training_works_as_it_is_printed(tmp_path):
    explodes = "--config.optimizer=sgd(piecewise(.01, boundaries=(3,), factor=1e30))"
    code, _, err = topgap("train", "--config", TINY, "--workdir", tmp_path / "a run", explodes)
    assert code == 2 and "is not finite at step " in err
    said, _, command = err.splitlines()[-1].partition("clipping: ")
    assert said.endswith("from the last sound checkpoint, with a lower learning rate or ")
    words = shlex.split(command)
    assert words[:4] == ["topgap", "train", "--config", f"{tmp_path}/a run/config.json"]
    assert f"--config.init={tmp_path}/a run/checkpoints/last/3" in words and explodes in words
    code, out, err = topgap(*("--config.optimizer=sgd(.01)" if word == explodes else word for word in words[1:]))
    assert code == 0 and "checkpoint best" in out, err
    assert (tmp_path / "a run_2" / "evaluation.json").is_file()


def test_a_damaged_evaluation_is_told_first(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "again")
    (workdir / "evaluation.json").write_text('{"rows": [{"spl')
    for line in (("evaluate", "--workdir", workdir), ("train", "--config", TINY, "--workdir", workdir)):
        code, _, err = topgap(*line)
        assert code == 2 and err.splitlines()[-1].startswith(
            f"topgap: {workdir}/evaluation.json is not an evaluation of"
        )
        assert "reading" not in err and "training" not in err


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_the_help_of_every_command(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    out = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(out):
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    text = out.getvalue()
    assert text.startswith(f"usage: topgap {command}".strip()) and max(map(len, text.splitlines())) <= 125
    options = {
        "train": "--no-evaluate",
        "evaluate": "--evaluators CALLS",
        "explain": "--images PATH",
        "report": "--out FILE",
    }
    assert options.get(command, "") in text


def test_the_examples_of_the_help_are_commands():
    """Every example is understood by the parser, with values of the config as they are meant."""
    texts = "\n".join([cli.texts.MAIN, *(command.more for command in cli.COMMANDS.values())])
    found = re.findall(r"^  topgap (.*)$", texts, re.M)
    assert len(found) > 8
    for line in found:
        arguments, overrides = cli._parse(shlex.split(line))
        assert arguments.command == line.split()[0]
        assert len(overrides) == line.count("--config.")
    for line in (*found, *re.findall(r"^topgap (train .*--plan .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)):
        if "--plan" in line:
            arguments, overrides = cli._parse(shlex.split(line))
            hosts, _, devices = arguments.plan.rpartition("x")
            batch = setup.config.load(ROOT / arguments.config, overrides).config.batch
            assert batch % (int(hosts or 1) * int(devices)) == 0, line


MISTAKES = [
    ("trian", "argument COMMAND: invalid choice: 'trian' (choose from "),
    ("train --config nowhere.py --workdir {new}", "there is no config file 'nowhere.py'"),
    ("train --config {config} --workdir {new} --config.epoch=3", "--config.epoch: there is no such key; did you mean 'epochs'?"),
    ("train --config {config} --workdir {new} --config.epochs=few", "--config.epochs: expected a whole number like 2, got 'few'"),
    ("train --config {config} --workdir {new} --config.epochs", "--config.epochs has no value; write --config.epochs=VALUE"),
    ("train --config {config} --workdir {new} --config.epochs --devices 2", "--config.epochs has no value; write "),
    ("train --config {config} --workdir {new} --config.epochs 0", "config.epochs must be a whole number of at least 1, got 0"),
    ("train --config {config} --workdir {new} --epochs 3", "unknown argument '--epochs'; see 'topgap train --help'"),
    ("train --config {config} --workdir {new} --device 3", "unknown argument '--device'; see 'topgap train --help'"),
    ("train --config {config} --workdir {new} --devices two", "argument --devices: invalid int value: 'two'; see 'topgap train"),
    ("train --config {config} --workdir {new} --config.pool=topgap(k=3)", "config.pool: 'topgap' is not a pool; did you mean 'top_gap'?"),
    ("train --config {config} --workdir {new} --config.pool=top_gap(k=3", "config.pool: 'top_gap(k=3' is not an expression"),
    ("train --config {config} --workdir {new} --config.train=trian", "shapes() has no split 'trian'; did you mean 'train'? choose from"),
    ("train --config {config} --workdir {new} --config.resize=squash", "config.resize must be 'stretch', 'crop' or 'centre', got 'squash'"),
    ("train --config {config} --workdir {new} --arm drop", "{config} has no arm 'drop'; did you mean 'dropped'? its arms are plain, dropped"),
    ("train --config {config} --workdir {new} --config.test=valid", "shapes() has no split 'valid'; did you mean 'validation'? choose from"),
    ("train --config {config} --workdir {new} --config.explain=grad_cam('nope')", "config.explain: grad_cam('nope'): no layer 'nope'; layers: backbone/"),
    ("train --config {config} --workdir {new} --config.model=with_drop(network,'nope',dropout(.1))", "config.model: no layer 'nope'; layers: backbone/"),
    ("train --config {config} --workdir {run} --config.epochs=3", "'{run}' holds a run with another config: epochs is 2 there and 3 here; take another workdir"),
    ("train --config {cifar} --workdir {new}", "config.source: tfds('cifar10') is not prepared in {data}/tfds (set TOPGAP_DATA to a folder that holds tfds/, or "),
    ("evaluate", "--workdir DIR or --config FILE is required; see 'topgap evaluate --help'"),
    ("evaluate --workdir {new}", "'{new}' is not the folder of a run: there is no such folder"),
    ("evaluate --workdir {data}", "'{data}' is not the folder of a run: it has no config.json"),
    ("evaluate --workdir {run} --split tset", "shapes() has no split 'tset'; did you mean 'test'? choose from test, "),
    ("evaluate --workdir {run} --split test[:0]", "shapes() split 'test[:0]' is empty; give a split with examples"),
    ("evaluate --workdir {run} --evaluators accurasy()", "--evaluators: 'accurasy' is not an evaluator; did you mean 'accuracy'?"),
    ("evaluate --workdir {run} --batch 0", "batch=0 must be at least 1"),
    ("evaluate --workdir {run} --batch 1000000000000", "a batch of 1000000000000 images of 32 x 32 pixels needs 12,288,000 GB, and this machine has "),
    ("evaluate --workdir {run} --config {config} --config {config}", "--config is given once; a second one is the Python file of a run's own methods"),
    ("evaluate --workdir {run} --config nowhere.py", "there is no config file 'nowhere.py'"),
    ("train --config {config} --config {config} --workdir {new}", "of two config files the first is the config.json of a run, the second a Python file; got "),
    ("evaluate --workdir {run} --weights x.npz", "--weights goes with --config; with --workdir the run's own checkpoint is used"),
    ("evaluate --config {config}", "--config needs --weights (or config.init): a config alone has no trained weights"),
    ("evaluate --config {config} --weights x.npz --checkpoint last", "--checkpoint goes with --workdir; with --config "),
    ("evaluate --config {config} --weights x.npz", "there is no weights file 'x.npz'"),
    ("evaluate --config {config} --weights x.pth", "there is no weights file 'x.pth'"),
    ("evaluate --config {config} --weights {npz}", "{npz} does not fit the model: missing: layer1.0."),
    ("explain --workdir {run} --images {data}", "pictures: folder {data} holds no picture (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff"),
    ("explain --workdir {run} --images {new}", "pictures: there is no file or folder {new}"),
    ("explain --workdir {run} --images {data} --split test", "argument --split: not allowed with argument --images"),
    ("explain --workdir {run} --methods grad_cam('stage9')", "--methods: grad_cam('stage9'): no layer 'stage9'; layers: backbone/stem/conv, "),
    ("explain --workdir {run} --target dsic", "--target: 'dsic' is no class; did you mean 'disc'? give a number, a class's name or runner_up"),
    ("train --config {config}", "the following arguments are required: --workdir; see 'topgap train --help'"),
    ("train --config {config} --plan 3", "a batch of 20 cannot be divided over 1 x 3 = 3 devices; make config.batch a multiple of 3"),
    ("evaluate --workdir {npz}", "'{npz}' is not the folder of a run: it is a file"),
    ("train --config {config} --plan 4y8", "--plan: HOSTSxDEVICES are two numbers such as 4x8, or one of devices, got '4y8'"),
    ("train --config {config} --workdir {new} --config.batch=1000000000000", "a batch of 1000000000000 images of 32 x 32 pixels needs 12,288,000 GB, and this machine has "),
    ("train --config {config} --workdir {new} --config.image_size=(100000,100000)", "a batch of "),
    ("explain --workdir {run} --target 6", "--target 6: there are 6 classes, 0 to 5"),
    ("explain --workdir {run} --channels", "--channels goes with --save FILE"),
    ("explain --workdir {run} --methods cam() --count 1 --save maps.txt --out {new}", "--save maps.txt: maps are kept in an .npz file; name one, such as maps.npz"),
    ("explain --workdir {run} --count many", "argument --count: expected a number or all, got 'many'; see 'topgap explain"),
    ("explain --workdir {run} --methods cam() --count 1 --out one.jpg", "--out one.jpg: sheets are PNG files; name a folder, or one.png"),
    ("evaluate --workdir {run} --evaluators robust(fgsm(linf(.1))) --save x.npy", "--save x.npy: images are kept in .npz files"),
    ("train --config {config} --workdir {npz}", "cannot write in the workdir '{npz}': '{npz}' is a file, no folder"),
    ("train --config {config} --workdir {npz}/new", "cannot write in the workdir '{npz}/new': '{npz}' is a file, no folder"),
    ("explain --workdir {run} --count -1", "--count must be a whole number of at least 1, got -1"),
    ("explain --workdir {run} --methods cam() --count 1 --out {npz}", "--out {npz}: sheets are PNG files; name a folder, or "),
    ("layers --config {config} --config.image_size=32", "--config.image_size: expected a tuple like (32, 32), got '32'"),
    ("compare {new}", "'{new}' is not a run: there is no such folder; name a folder that `topgap train --workdir` wrote"),
    ("report {data}", "'{data}' is not a run: it has no config.json; name a folder that `topgap train --workdir` wrote"),
    ("report {run} --out {data}", "'{data}' is a folder; name the HTML file to write, such as '{data}/report.html'"),
    ("help topgap", "there is nothing named 'topgap'; did you mean 'top_gap'? 'topgap help' lists all names"),
    ("compare {run} --config.eps=3", "--config.eps has no meaning for 'topgap compare'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"), MISTAKES, ids=[line.replace("{", "").replace("}", "") for line, _ in MISTAKES]
)
def test_a_mistake_is_answered_by_one_line(line, words, run, tmp_path, monkeypatch):
    data, npz = tmp_path / "data", tmp_path / "net.npz"
    data.mkdir()
    np.savez(npz, **{"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})
    monkeypatch.setenv("TOPGAP_DATA", str(data))
    places = {"config": TINY, "new": tmp_path / "new", "run": run[0], "data": data, "npz": npz}
    places["cifar"] = ROOT / "configs" / "cifar10.py"
    fill = lambda text: re.sub(r"\{(\w+)\}", lambda match: str(places[match[1]]), text)
    code, out, err = topgap(*[fill(word) for word in line.split()])
    assert (code, out) == (2, "")
    *before, last = err.splitlines()
    assert last.startswith(f"topgap: {fill(words)}")
    assert all(re.match("CPU: |reading |training: ", line) for line in before)
    assert not (tmp_path / "new").exists()


def test_a_batch_that_the_devices_do_not_divide(run, tmp_path, monkeypatch):
    for module in (fit_module, setup.commands):
        monkeypatch.setattr(module, "data_mesh", data_mesh)
    text = "topgap: batch=20 cannot be split evenly over 8 devices; take 16 or 24"
    for line in (("train", "--config", TINY, "--workdir", tmp_path / "new"), ("evaluate", "--workdir", run[0])):
        code, _, err = topgap(*line)
        assert (code, err.splitlines()[-1]) == (2, text)


def test_interruptions(monkeypatch):
    def stop(arguments, overrides):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=stop))
    assert topgap("help") == (130, "", "topgap: stopped\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_with_its_code_and_a_line(name, code, monkeypatch):
    """Where nothing is there to be saved; one that was ignored at the start (nohup) stays ignored."""
    number = getattr(signal, name)

    def work(arguments, overrides):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        print("done")

    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=work))
    before = signal.signal(number, signal.SIG_DFL)  # as of a program that nobody started by nohup
    try:
        assert topgap("help") == (code, "", f"topgap: stopped by {name}\n")
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        assert topgap("help") == (0, "done\n", "")
        with stop_requests() as asked:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert asked(3) == 0 and signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        with stop_requests() as asked:
            assert asked(1) == 0
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert asked(2) == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_reader_that_goes_away_ends_no_work(monkeypatch):
    """`topgap train | head`: what it would say goes nowhere, and the work and its exit code are what they are."""
    read, write = os.pipe()
    os.close(read)
    done = []

    def work(arguments, overrides):
        for _ in range(3):
            print("x" * 100_000, flush=True)
            print("y" * 100_000, file=sys.stderr, flush=True)
        done.append(True)
        raise UserError("a mistake")

    monkeypatch.setitem(cli.COMMANDS, "help", cli.COMMANDS["help"]._replace(run=work))
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", closed)
        code = cli.main(["help"])
        assert sys.stdout is closed
        monkeypatch.undo()
    assert code == 2 and done == [True]


def test_as_a_program():
    """Nothing but the answer, and the two exit codes that a shell sees."""
    for words, code, out in ((("help", "gmp"), 0, "gmp()\n\nGlobal max pooling"), (("help", "gmpp"), 2, "")):
        process = program(*words)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == code and stdout.startswith(out), stderr
        assert bool(stderr) == (code == 2) and "Traceback" not in stderr


@pytest.mark.slow
def test_a_stopped_training_says_how_to_go_on(tmp_path):
    workdir = tmp_path / "run"
    words = ("train", "--config", TINY, "--workdir", workdir, "--config.epochs=150", "--config.checkpoint_every=1000",
             "--no-evaluate")  # fmt: skip
    process = program(*words)
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    last = err.splitlines()[-1]
    assert re.fullmatch(r"topgap: stopped and saved at step \d+ of 450; to go on, give the same command again", last)
    assert all(re.match("CPU: |reading |training: |topgap: ", line) for line in err.splitlines())
    assert topgap(*words)[0] == 0
    steps = [row["step"] for row in read_metrics(workdir) if row["kind"] == "train"]
    assert steps == list(range(1, 451))


@pytest.mark.slow
def test_two_devices_agree_with_one(run, tmp_path):
    process = program("train", "--config", TINY, "--workdir", tmp_path / "two", "--devices", 2)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "; 2 devices, NPROC=" in err.splitlines()[0]
    assert json.loads((tmp_path / "two" / "versions.json").read_text())["mesh_devices"] == 2
    for one, two in zip(*(read_metrics(workdir) for workdir in (run[0], tmp_path / "two")), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        np.testing.assert_allclose([two[name] for name in NAMES], [one[name] for name in NAMES], rtol=1e-4)
    tables = [results.read(folder / "evaluation.json").rows for folder in (run[0], tmp_path / "two")]
    for one, two in zip(*tables):
        assert one.key == two.key
        for name, measure in one.numbers.items():
            assert two.numbers[name].value == pytest.approx(measure.value, rel=1e-3), name
