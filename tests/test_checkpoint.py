"""Checkpoints: exact, on any number of devices, of the newest that is whole; errors that say what is wrong."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh, replicated
from topgap_jax.run import checkpoint


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


def test_best_is_one_and_trees_can_be_read_alone(tmp_path):
    write(tmp_path, (4, 9), "best")
    assert [path.name for path in (tmp_path / "checkpoints" / "best").iterdir()] == ["9"]
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


# Where one array cannot be read, Orbax leaves the coroutines of the others behind; Python 3.13 says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^there is no checkpoint in .*/checkpoints/last; train first: topgap train"):
        checkpoint.restore(tmp_path, "last", trees())
    write(tmp_path, (5,))
    other = {"variables": {**trees()["variables"], "params": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)}}}
    with pytest.raises(
        UserError, match=r"last/5 is of another model, or damaged \(then delete that folder\): "
    ) as error:
        checkpoint.restore(tmp_path, "last", other)
    assert "(2, 4)" in str(error.value) and "\n" not in str(error.value)
    for path in (tmp_path / "checkpoints" / "last" / "5" / "variables").rglob("d/*"):
        path.write_bytes(b"not what it was")
    with pytest.raises(UserError, match=r"last/5 is of another model, or damaged") as error:
        checkpoint.restore(tmp_path, "last", trees())
    assert "\n" not in str(error.value)
    gc.collect()
