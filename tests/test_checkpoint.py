"""Checkpoints: exact, on any number of devices, of the newest that is whole; errors that say what is wrong."""

import gc
import logging
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, replicated
from topgap_jax.run import checkpoint, manifest


def trees(scale: float = 1.0):
    params = {"kernel": scale * jnp.linspace(0, 1, 6).reshape(2, 3), "bias": scale * jnp.ones(3, jnp.bfloat16)}
    variables = {"params": params, "batch_stats": {}, "key": jax.random.key(7)}
    return {"variables": variables, "optimizer": optax.adam(optax.linear_schedule(1, 0, 9)).init(params)}


def write(workdir, steps, which="last", **changes):
    with checkpoint.opened(workdir) as folders:
        for step in steps:
            checkpoint.save(getattr(folders, which), step, trees(step) | changes, {"step": step, "best": 0.1})


def assert_same(left, right):
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(plain(a), plain(b))


def test_what_was_saved_comes_back_and_two_are_kept(tmp_path):
    assert checkpoint.latest_step(tmp_path) is None
    write(tmp_path, (1, 2, 3))
    write(tmp_path, (2, 3))  # a resumed run comes by these steps again
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "last").iterdir()) == ["2", "3"]
    assert checkpoint.latest_step(tmp_path) == 3 and checkpoint.latest_step(tmp_path, "best") is None
    found, meta = checkpoint.restore(tmp_path, "last", trees())
    assert_same(found, trees(3))
    assert meta == {"step": 3, "best": 0.1}


def test_trees_can_be_read_alone(tmp_path):
    write(tmp_path, (4, 9), "best")
    found, _ = checkpoint.restore(tmp_path, "best", {"variables": jax.eval_shape(lambda: trees()["variables"])})
    assert_same(found, {"variables": trees(9)["variables"]})


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 2)])
def test_restores_on_another_number_of_devices(tmp_path, before, after):
    held = jax.device_put(trees(2), replicated(data_mesh(jax.devices()[:before])))
    write(tmp_path, (1,), **held)
    place = replicated(data_mesh(jax.devices()[:after]))
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), trees())
    found, _ = checkpoint.restore(tmp_path, "last", described)
    assert_same(found, trees(2))
    assert all(len(leaf.devices()) == after for leaf in jax.tree.leaves(found))


def test_a_save_that_was_killed_is_passed_over(tmp_path):
    write(tmp_path, (1, 2))
    folder = tmp_path / "checkpoints" / "last"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")  # the name a checkpoint has until it is whole
    assert checkpoint.latest_step(tmp_path) == 1
    write(tmp_path, (2,))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, (1,))
    folder = tmp_path / "checkpoints" / "last"
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5_000_000))
    with pytest.raises(UserError) as error:
        write(tmp_path, (2,))
    assert str(error.value) == (
        f"the checkpoint of step 2 needs 16 MB in {folder}, and 5 MB are free on that disk; make room, then give the "
        "same command again: it goes on from the checkpoint before"
    )
    assert [path.name for path in folder.iterdir()] == ["1"] and checkpoint.latest_step(tmp_path) == 1
    monkeypatch.undo()
    write(tmp_path, (2,))
    assert checkpoint.latest_step(tmp_path) == 2


def test_a_save_that_the_disk_refuses_is_one_line_and_leaves_the_one_before(tmp_path, monkeypatch):
    """A quota, say, which nothing tells beforehand."""
    write(tmp_path, (1,))

    def refused(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing 'a'\n: Disk quota exceeded")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", refused)
    with pytest.raises(UserError) as error:
        write(tmp_path, (2,))
    assert str(error.value) == (
        f"the checkpoint of step 2 cannot be written in {tmp_path / 'checkpoints' / 'last'}: RESOURCE_EXHAUSTED: Error "
        "writing 'a' : Disk quota exceeded; mend that, then give the same command again: it goes on from the checkpoint "
        "before"
    )
    monkeypatch.undo()
    assert checkpoint.latest_step(tmp_path) == 1
    write(tmp_path, (2,))


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match=r"^there is no checkpoint in .*/checkpoints/last; train first: topgap train"):
        checkpoint.restore(tmp_path, "last", trees())
    write(tmp_path, (5,))
    other = {"variables": {**trees()["variables"], "params": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)}}}
    with pytest.raises(UserError, match=r"last/5 is of another model: ") as error:
        checkpoint.restore(tmp_path, "last", other)
    assert "(2, 4)" in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


# Where one array cannot be read, Orbax leaves the coroutines of the others behind; Python 3.13 says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_without_a_manifest_is_read_and_says_so(tmp_path, capsys):
    write(tmp_path, (5,))
    folder = tmp_path / "checkpoints" / "last" / "5"
    (folder / manifest.FILE).unlink()
    found, _ = checkpoint.restore(tmp_path, "last", trees())
    assert_same(found, trees(5))
    assert capsys.readouterr().err == (
        f"topgap: {folder} has no manifest.json: an older version wrote it, or its save was cut short; it is read "
        "unchecked\n"
    )
    for path in (folder / "variables").rglob("d/*"):
        path.write_bytes(b"not what it was")
    with pytest.raises(UserError, match=r"last/5 is of another model, or damaged: ") as error:
        checkpoint.restore(tmp_path, "last", trees())
    assert "\n" not in str(error.value)
    gc.collect()


def flip(path, place=-1, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


DAMAGES = {  # what happens to a folder of a checkpoint, and what is said of it
    "a bit": (lambda folder, file: flip(file), "{file} has another content than was written"),
    "cut": (lambda folder, file: file.write_bytes(file.read_bytes()[:-1]), "{file} has {less} bytes instead of {size}"),
    "gone": (lambda folder, file: file.unlink(), "{file} is missing"),
    "more": (lambda folder, file: (folder / "zz").write_bytes(b""), "zz is not of this checkpoint"),
    "manifest": (lambda folder, file: flip(folder / manifest.FILE, 0, 2), "manifest.json is not what was written"),
    "no file": (lambda folder, file: (file.unlink(), file.mkdir()), "{file} is missing"),
}


def test_a_tree_is_read_without_a_word(tmp_path, caplog):
    """Orbax warns that it holds no metadata of a step, as no tree does."""
    write(tmp_path, (1,))
    with caplog.at_level("WARNING"):
        assert_same(checkpoint.stored(tmp_path, "last", "variables")["params"], trees(1)["variables"]["params"])
    assert not caplog.records


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_told_and_the_older_checkpoint_is_taken(kind, tmp_path, capsys):
    """By who reads; a training moves it aside, so that its step can be saved again."""
    write(tmp_path, (1, 2))
    folder = tmp_path / "checkpoints" / "last" / "2"
    file = next(path for path in sorted((folder / "variables").rglob("d/*")) if path.stat().st_size > 100)
    said = {"file": file.relative_to(folder), "size": file.stat().st_size, "less": file.stat().st_size - 1}
    act, words = DAMAGES[kind]
    act(folder, file)
    found, meta = checkpoint.restore(tmp_path, "last", trees())
    assert_same(found, trees(1))
    assert meta["step"] == 1
    reason = words.format(**said)
    assert capsys.readouterr().err == (
        f"topgap: the checkpoint {folder} is damaged: {reason}; the one of step 1 is read in its place\n"
    )
    assert_same(checkpoint.stored(tmp_path, "last", "variables")["params"], trees(1)["variables"]["params"])
    capsys.readouterr()
    assert checkpoint.set_aside(tmp_path) and not checkpoint.set_aside(tmp_path)
    place = tmp_path / "checkpoints" / "damaged" / "last_2"
    assert capsys.readouterr().err == f"topgap: the checkpoint {folder} is damaged: {reason}; moved to {place}\n"
    write(tmp_path, (2,))
    found, meta = checkpoint.restore(tmp_path, "last", trees())
    assert meta["step"] == 2 and capsys.readouterr().err == ""


def test_every_flipped_bit_is_noticed(tmp_path):
    """Of every file, the manifest included, without reading it by Orbax."""
    write(tmp_path, (1,))
    folder = tmp_path / "checkpoints" / "last" / "1"
    assert manifest.damage(folder) == ""
    random = np.random.default_rng(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        good = path.read_bytes()
        for place in random.integers(0, max(len(good), 1), 3) if good else ():
            flip(path, place, 1 << random.integers(8))
            assert manifest.damage(folder), (path, place)
            path.write_bytes(good)
    assert manifest.damage(folder) == ""


def test_a_checkpoint_that_a_training_removes_while_it_is_read(tmp_path, monkeypatch, capsys):
    """An evaluation beside a training takes the one that is there then."""
    write(tmp_path, (1, 2))
    open_manager = checkpoint.ocp.CheckpointManager

    def manager(*arguments, **options):
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "checkpoints" / "last" / "2")
        raise FileNotFoundError(2, "No such file or directory", "2")

    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", manager)
    found, meta = checkpoint.restore(tmp_path, "last", trees())
    assert meta["step"] == 1 and open_manager is checkpoint.ocp.CheckpointManager
    assert_same(found, trees(1))
    assert capsys.readouterr().err == ""


def test_no_whole_checkpoint_is_an_error(tmp_path):
    write(tmp_path, (1, 2))
    for step in (1, 2):
        (tmp_path / "checkpoints" / "last" / str(step) / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError) as error:
        checkpoint.restore(tmp_path, "last", trees())
    assert str(error.value) == (
        f"the checkpoint {tmp_path}/checkpoints/last/2 is damaged: _CHECKPOINT_METADATA is missing; there is no older "
        "one of its kind"
    )


def test_what_is_raised_anyway_leaves_no_traceback_on_the_terminal(monkeypatch, caplog):
    """TensorStore's late answers, of no object, and what ends a thread of Orbax; all else is told as before."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    checkpoint._tell_once.cache_clear()
    checkpoint._tell_once()
    said = lambda value, of=None: SimpleNamespace(exc_value=value, object=of)
    others = [said(RuntimeError("another")), said(RuntimeError("Event loop is closed"), of=told)]
    for each in (said(RuntimeError("Event loop is closed")), *others):
        sys.unraisablehook(each)
    assert told == others
    text, logger = "[process=0][thread=%s] _SignalingThread.run() raised an exception: %s", logging.getLogger("absl")
    with caplog.at_level(logging.ERROR, "absl"):
        logger.error(text, "Thread-3", "stale", exc_info=OSError("stale"))
        logger.error("another", exc_info=OSError("stale"))
    assert [record.getMessage() for record in caplog.records] == ["another"]
    checkpoint._tell_once.cache_clear()
