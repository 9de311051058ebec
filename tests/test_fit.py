"""The training loop: equal to a loop written out, exact after a kill or a stop, and clear about what went wrong."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from tests import tiny_fit
from tests.tiny_fit import CONFIG, STEPS, flat, parts
from topgap_jax.data import Source, epoch_ids, stream
from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh
from topgap_jax.progress import read_metrics
from topgap_jax.run import checkpoint, divergence, locks
from topgap_jax.run import fit as fit_module
from topgap_jax.run import workdir as workdir_module
from topgap_jax.run.fit import Stopped, fit
from topgap_jax.run.workdir import claim
from topgap_jax.training.objectives import standard
from topgap_jax.training.optimizers import sgd


def train(workdir, config=CONFIG, **changes):
    return fit(config, workdir, parts(**changes), mesh=data_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run: (folder, all its numbers)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, flat(train(workdir))


@pytest.fixture
def whole(trained, tmp_path_factory):
    """A copy of it for each test, which may write there."""
    workdir, numbers = trained
    return shutil.copytree(workdir, tmp_path_factory.mktemp("whole") / "run"), numbers


def test_fit_is_this_loop(tmp_path):
    given = parts(augments=(), epochs=1, ema=0.5, optimizer=optax.sgd(0.1), objective=plain_objective)
    found = fit(CONFIG, tmp_path, given, mesh=data_mesh(jax.devices()[:1]))
    data, model = given.train, given.model
    variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 6, 6, 3)))
    params, batch_stats = variables["params"], variables["batch_stats"]
    average = variables

    @jax.jit
    def differentiate(params, batch_stats, images, labels):
        def loss(params):
            out = model.apply({"params": params, "batch_stats": batch_stats}, images, train=True, keys=KEYS)
            return -jax.nn.log_softmax(out.logits)[jnp.arange(8), labels].mean(), out.batch_stats

        return jax.grad(loss, has_aux=True)(params)

    for step, ids in enumerate(epoch_ids(3, 0, 44, 8)):
        images, labels = data["image"][ids] / np.float32(255), data["label"][ids]
        gradient, batch_stats = differentiate(params, batch_stats, images, labels)
        params = jax.tree.map(lambda value, slope: value - 0.1 * slope, params, gradient)
        d = min(0.5, (1 + step) / (10 + step))
        average = jax.tree.map(
            lambda old, new, d=d: d * old + (1 - d) * new, average, {"params": params, "batch_stats": batch_stats}
        )
    expected = {"params": params, "batch_stats": batch_stats, "ema": average}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), dict(found), expected)


KEYS = jax.random.split(jax.random.key(0), 8)


def plain_objective(keys, model, variables, batch, step):
    """Cross-entropy, with the same dropout in every step."""
    out = model.apply(variables, batch["image"], train=True, keys=KEYS)
    return optax.softmax_cross_entropy(out.logits, batch["targets"]), {}, out.batch_stats


def test_every_start_is_recorded_and_other_conditions_are_said(tmp_path, capsys, monkeypatch):
    mesh = data_mesh(jax.devices()[:1])
    workdir_module.record_versions(tmp_path, mesh)
    workdir_module.record_versions(tmp_path, mesh)
    assert capsys.readouterr().err == ""
    about = workdir_module.provenance()
    assert about["threefry_partitionable"] is True
    other = about | {"processor": "another", "versions": about["versions"] | {"jax": "9.9"}}
    other["threefry_partitionable"] = False
    monkeypatch.setattr(workdir_module, "provenance", lambda: other)
    workdir_module.record_versions(tmp_path, mesh)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"versions jax {jax.__version__} -> 9.9" in line
    assert f"processor {about['processor']} -> another" in line and "threefry_partitionable True -> False" in line
    assert "the bits may differ from here on" in line
    stored = workdir_module.read_versions(tmp_path / "versions.json")
    assert stored["processor"] == "another" and stored["threads"] >= 1
    assert [start["processor"] for start in stored["earlier"]] == [about["processor"]] * 2


def test_a_run_leaves_its_records(whole):
    workdir, _ = whole
    stored = workdir_module.read_config(workdir / "config.json")
    assert stored == {"config": {**CONFIG, "sizes": [6, 6]}, "file": None}
    versions = json.loads((workdir / "versions.json").read_text())
    assert versions["versions"]["jax"] == jax.__version__ and versions["mesh_devices"] == 1 and versions["command"]
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [(row["step"], row["epoch"]) for row in rows if row["kind"] == "validation"] == [(5, 1), (10, 2), (15, 3)]
    assert all(np.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in rows)
    assert list((workdir / "tensorboard").iterdir())
    meta = workdir / "checkpoints" / "last" / str(STEPS) / "meta" / "metadata"
    assert json.loads(meta.read_text())["rows"] == len(rows)
    best = max((row for row in rows if row["kind"] == "validation"), key=lambda row: row["accuracy"])
    assert checkpoint.latest_step(workdir, "best") == best["step"]
    assert checkpoint.latest_step(workdir) == STEPS
    template = jax.eval_shape(lambda: {"params": 0})
    with pytest.raises(UserError):
        checkpoint.restore(workdir, "best", {"optimizer": template})  # best is for evaluation: variables only


def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path):
    workdir, expected = whole
    command = [sys.executable, tiny_fit.__file__, str(tmp_path), "kill_at=9", "devices=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.latest_step(tmp_path) == 5
    assert {row["step"] for row in read_metrics(tmp_path)} >= {2, 4, 5}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kind": "tr')  # and it died while writing a row
    np.testing.assert_array_equal(flat(train(tmp_path)), expected)
    assert read_metrics(tmp_path) == read_metrics(workdir)


def flip(workdir, which, step):
    """One bit of a checkpoint's arrays."""
    files = (path for path in sorted((workdir / "checkpoints" / which / str(step)).rglob("d/*")))
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, capsys):
    """To the same bits, of every checkpoint; where none is left it says so and begins anew when asked again."""
    workdir, expected = whole
    flip(workdir, "last", STEPS)
    np.testing.assert_array_equal(flat(train(workdir)), expected)
    assert f"last/{STEPS} is damaged: variables/" in capsys.readouterr().err
    assert checkpoint.latest_step(workdir) == STEPS and (workdir / "checkpoints/damaged" / f"last_{STEPS}").is_dir()
    for step in (STEPS - 5, STEPS):
        flip(workdir, "last", step)
    with pytest.raises(UserError) as error:
        train(workdir)
    assert str(error.value) == (
        f"no checkpoint of '{workdir}' is left to go on from; the same command again begins anew"
    )
    np.testing.assert_array_equal(flat(train(workdir)), expected)


def test_a_best_checkpoint_that_is_lost_is_said_and_written_again(whole, tmp_path, capsys):
    """A run that is taken up before its best step writes it again; one that is over says what is left."""
    workdir, _ = whole
    best = checkpoint.latest_step(workdir, "best")
    shutil.rmtree(workdir / "checkpoints" / "best")
    train(workdir)
    accuracy = next(r["accuracy"] for r in read_metrics(workdir) if r["kind"] == "validation" and r["step"] == best)
    line = (
        f"topgap: the best checkpoint, of validation accuracy {accuracy:.4g}, is lost; no other one is there: the next"
    )
    assert line in capsys.readouterr().err
    shutil.rmtree(workdir / "checkpoints" / "last" / str(STEPS))
    train(workdir)
    assert checkpoint.latest_step(workdir, "best") == STEPS


def test_sigterm_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch):
    assert threading.current_thread() is threading.main_thread()
    _, expected = whole
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(fit_module, "_placed", fit_module._placed)  # so that it is restored
    tiny_fit.send_signal_at(7, signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path)
    assert str(stopped.value) == "stopped and saved at step 7 of 15; to go on, give the same command again"
    assert checkpoint.latest_step(tmp_path) == 7
    assert signal.getsignal(signal.SIGTERM) is before
    np.testing.assert_array_equal(flat(train(tmp_path)), expected)


def test_a_stream_trains_like_resident_arrays_and_resumes(whole, tmp_path, monkeypatch):
    _, expected = whole
    arrays = parts().train
    read = lambda index: {"image": arrays["image"][index], "label": int(arrays["label"][index])}
    source = Source("numbers", "train", ("a", "b", "c"), 44, read)
    batches = lambda: stream(source, (6, 6), seed=3, batch=8, threads=2)
    monkeypatch.setattr(fit_module, "_placed", fit_module._placed)  # so that it is restored
    tiny_fit.send_signal_at(7, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started by `&`
    try:
        with pytest.raises(Stopped):
            train(tmp_path, train=batches())
    finally:
        signal.signal(signal.SIGINT, before)
    found = flat(train(tmp_path, train=batches()))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_an_objective_of_ones_own_raises_is_one_line(tmp_path):
    def broken(keys, model, variables, batch, step):
        return batch["nothing"]

    with pytest.raises(UserError, match=r"^the step of objective, augment and optimizer: KeyError: 'nothing'$"):
        train(tmp_path, objective=broken)


def nan_loss(step, loss):
    return jnp.where(step < 8, loss, jnp.nan)


def nan_gradient(step, loss):
    return loss + jnp.sqrt(jnp.where(step < 8, 1.0, 0.0) * loss)  # finite, but not its gradient


@pytest.mark.parametrize(
    ("spoil", "what"), [pytest.param(nan_loss, "loss", marks=pytest.mark.slow), (nan_gradient, "gradient")]
)
def test_a_loss_that_is_not_finite_stops(tmp_path, spoil, what):
    inner = standard()

    def objective(keys, model, variables, batch, step):
        loss, logs, batch_stats = inner(keys, model, variables, batch, step)
        return spoil(step, loss), logs, batch_stats

    with pytest.raises(UserError) as error:
        train(tmp_path, objective=objective)
    text = str(error.value)
    assert text.startswith(f"the {what} is not finite at step 9 (loss ")
    assert text.endswith(
        "); from the last sound checkpoint, with a lower learning rate or clipping: topgap train --config "
        f"{tmp_path}/config.json --config.init={tmp_path}/checkpoints/last/5 --workdir {tmp_path}_2"
    )
    trees, _ = checkpoint.restore(tmp_path, "last", {"variables": jax.eval_shape(lambda: start())})
    assert np.isfinite(flat(trees)).all()


def start():
    variables = parts().model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))
    return {**variables, "ema": variables}


def rows(workdir, *rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))


def test_the_checkpoint_that_is_named_was_not_exploding(tmp_path):
    """A state may be finite and its next loss 1e28."""
    for step in (10, 20):
        (tmp_path / "checkpoints" / "last" / str(step)).mkdir(parents=True)
    train = lambda step, loss: {"step": step, "kind": "train", "loss": loss}
    validation = lambda step, loss: {"step": step, "kind": "validation", "loss": loss}
    rows(
        tmp_path, train(5, 2.0), train(10, 1.5), validation(10, 1.4), train(15, 1.2), train(20, 1.0), validation(20, 9)
    )
    assert divergence.sound_step(tmp_path, 23, [1.1, 7.0]) == 20, "the next loss is 1.1"
    assert divergence.sound_step(tmp_path, 23, [1e28, 7.0]) == 10
    assert divergence.sound_step(tmp_path, 21, []) == 20, "no loss yet: that of its validation"
    rows(tmp_path, train(5, 2.0), train(10, 1.5), train(15, "a word"), train(20, 1e6), validation(20, 1e9))
    assert divergence.sound_step(tmp_path, 21, []) is None
    assert divergence.sound_step(tmp_path / "absent", 21, []) is None


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    objective = lambda keys, model, variables, batch, step: (
        jnp.inf * keys.shape[0] + batch["mask"],
        {},
        variables["batch_stats"],
    )
    with pytest.raises(
        UserError, match=r"^the loss is not finite at step 1 \(loss inf\); no checkpoint is sound yet: lower"
    ):
        train(tmp_path, objective=objective, ema=0.0)


def test_a_finished_run_is_left_as_it_is(whole):
    workdir, expected = whole
    rows = (workdir / "metrics.jsonl").read_text()
    np.testing.assert_array_equal(flat(train(workdir)), expected)
    assert (workdir / "metrics.jsonl").read_text() == rows


HOLD = """
import os, sys, time, warnings
from pathlib import Path
from topgap_jax.run import locks
locks.take(Path(sys.argv[1]), locks.TRAINING)
locks.take(Path(sys.argv[1]), locks.EVALUATION)
warnings.simplefilter("ignore")
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_two_trainings_or_two_evaluations_in_one_folder(tmp_path):
    """The second is told whose the folder is; a lock dies with its process, however it ends, also where children that
    it forked live on, and with its training."""
    config = {"seed": 3}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        child = int(other.stdout.readline())
        for what, start in (("training", lambda: claim(tmp_path, config)), ("evaluation", evaluates(tmp_path))):
            with pytest.raises(UserError) as error:
                start()
            assert str(error.value) == (
                f"another {what} writes in '{tmp_path}' (process {other.pid} on {socket.gethostname()}); wait for its "
                "end, or take another workdir"
            )
    finally:
        other.kill()
        other.wait()
    try:
        os.kill(child, 0)  # it is there
        claim(tmp_path, config)
        evaluates(tmp_path)()
    finally:
        os.kill(child, signal.SIGKILL)
        other.communicate()
    claim(tmp_path, config)  # the same process may: a training that is taken up again in a notebook
    assert (tmp_path / locks.TRAINING).read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
    locks.release(tmp_path, locks.TRAINING)
    for name in (locks.TRAINING, locks.EVALUATION):
        with (tmp_path / name).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def evaluates(workdir):
    def evaluate():
        with locks.evaluating(workdir):
            pass

    return evaluate


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    claim(tmp_path, {"seed": 3})
    line = f"topgap: the file system of '{tmp_path}' has no locks (No locks available): start no second process there"
    assert capsys.readouterr().err == f"{line} yourself\n"


def test_a_training_lets_its_folder_go(trained):
    with (trained[0] / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_another_config_is_refused(whole, tmp_path):
    workdir, _ = whole
    text = f"'{workdir}' holds a run with another config: seed is 3 there and 4 here; take another workdir"
    for config in ({**CONFIG, "seed": 4}, ConfigDict({**CONFIG, "seed": 4})):
        with pytest.raises(UserError) as error:
            train(workdir, config)
        assert str(error.value) == text
    with pytest.raises(UserError, match=f"another config: batch is {CONFIG['batch']} there and absent here"):
        train(workdir, {"seed": 3})
    # What only concerns looking at a run, and a key that is younger than the run, may differ; config.json follows.
    for changed in ({**CONFIG, "log_every": 3, "test": "other"}, CONFIG, {**CONFIG, "new": 1}):
        train(workdir, changed)
        assert json.loads((workdir / "config.json").read_text())["config"] == {**changed, "sizes": [6, 6]}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        UserError, match=r"config\.json is not the config\.json of a run: Expecting .*; take another workdir, or move"
    ):
        train(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write in the workdir '.*/file': (File exists|Not a directory)$"):
        train(tmp_path / "file")


def test_fewer_examples_than_a_batch_and_no_validation(tmp_path):
    changes = {"train": tiny_fit.arrays(0, 5), "examples": 5, "validation": None, "epochs": 2, "ema": 0.0}
    variables = train(tmp_path, {}, **changes, optimizer=sgd(0.01))
    assert set(variables) == {"params", "batch_stats"} and np.isfinite(flat(variables)).all()
    assert checkpoint.latest_step(tmp_path) == 2 and checkpoint.latest_step(tmp_path, "best") is None
    assert [row["step"] for row in read_metrics(tmp_path)] == [2]


def test_checkpoints_as_often_as_asked_and_validation_after_every_epoch(tmp_path):
    train(tmp_path, {"checkpoint_every": 2})
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "last").iterdir()) == ["10", "15"]
    assert [row["step"] for row in read_metrics(tmp_path) if row["kind"] == "validation"] == [5, 10, 15]


def test_nothing_is_sent_to_the_device_unasked(tmp_path):
    with jax.transfer_guard_host_to_device("disallow"):
        train(tmp_path, epochs=1, validation=None)
