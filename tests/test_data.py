"""Folders, pictures, decoding, resident sets and streams; TFDS sets are in test_tfds.py."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from topgap_jax import data
from topgap_jax.data.source import crop_window, slice_split, threads_for
from topgap_jax.errors import UserError


def picture(i, h=12, w=16):
    return np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)


def memory_source(n=23, h=6, w=5, broken=-1):
    """A source of random images that needs no file."""

    def read(i):
        if i == broken:
            raise ValueError("no such bytes")
        return {"image": picture(i, h, w), "label": i % 4, "group": i % 2}

    return data.Source("memory()", "train", tuple("abcd"), n, read, (h, w), ("group",))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def test_folder_with_and_without_splits(tmp_path):
    for i in range(10):
        save(tmp_path / "plain" / "ab"[i % 2] / f"{i}.png", picture(i))
        save(tmp_path / "split" / ("train" if i < 7 else "test") / "ab"[i % 2] / f"{i}.PNG", picture(i))
    (tmp_path / "plain" / "a" / "notes.txt").write_text("not a picture")
    plain, split = data.folder(str(tmp_path / "plain")), data.folder(str(tmp_path / "split"))
    assert plain("all").classes == ("a", "b")
    rows = [*plain("all[:80%]"), *plain("all[80%:]")]
    assert sorted(row["name"] for row in rows) == sorted(f"{i}.png" for i in range(10))
    for row in rows:
        number = int(row["name"][0])
        assert row["label"] == number % 2
        np.testing.assert_array_equal(row["image"], picture(number))
    assert {row["name"] for row in plain("all[:50%]")} != {f"{i}.png" for i in range(0, 10, 2)}  # not class by class
    assert (len(split("train")), len(split("test"))) == (7, 3)
    with pytest.raises(UserError, match=r"has no split 'tset'; did you mean 'test'\? choose from test, train"):
        split("tset")
    with pytest.raises(UserError, match=r"folder\('nowhere'\): there is no such folder"):
        data.folder("nowhere")
    with pytest.raises(UserError, match="holds no pictures in <class>/ or <split>/<class>/"):
        data.folder(str(tmp_path / "plain" / "a"))


def test_pictures_are_rgb_and_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    save(tmp_path / "a.png", picture(0)[..., 0])
    save(tmp_path / "b.jpg", picture(1), exif=exif, quality=100)
    source = data.pictures(str(tmp_path))
    assert [(row["name"], row["label"], row["image"].shape) for row in source] == [
        ("a.png", -1, (12, 16, 3)),
        ("b.jpg", -1, (16, 12, 3)),
    ]
    np.testing.assert_array_equal(source[0]["image"], np.repeat(picture(0)[..., :1], 3, -1))
    assert len(data.pictures([str(tmp_path / "a.png"), str(tmp_path)])) == 3
    (tmp_path / "c.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"split 'all' index 2: test_pict\w*/c.jpg is no picture of the formats "):
        data.decode(data.pictures(str(tmp_path)), 2, (8, 8))
    with pytest.raises(UserError, match="there is no file or folder nowhere"):
        data.pictures("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no picture"):
        data.pictures(str(tmp_path / "empty"))


@given(st.integers(1, 60), st.integers(-60, 60), st.integers(-60, 60))
def test_slices_are_python_slices(n, start, stop):
    text = f"train[{start}:{stop}]"
    if -n <= start <= n and -n <= stop <= n:
        assert list(slice_split(text, {"train": n}, "set")[1]) == list(range(n))[start:stop]
    else:
        with pytest.raises(UserError, match=f"reaches beyond the {n} examples of 'train'"):
            slice_split(text, {"train": n}, "set")


def test_percent_slices_divide_a_split():
    parts = [slice_split(text, {"train": 33}, "set")[1] for text in ("train[:20%]", "train[20%:-10%]", "train[-10%:]")]
    assert [i for part in parts for i in part] == list(range(33))


@example(49, 100, 8, 8)  # 8 / (8 / 49) is 49.00000000000001, which Pillow refuses
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_a_crop_is_centred_inside_and_keeps_the_aspect(h, w, height, width):
    top, left, part_h, part_w = crop_window((h, w), (height, width), "crop")
    np.testing.assert_allclose(part_h / part_w, height / width, rtol=1e-9)
    np.testing.assert_allclose([2 * top + part_h, 2 * left + part_w], [h, w], rtol=1e-9)
    assert top >= 0 and left >= 0 and top + part_h <= h and left + part_w <= w and min(top / h, left / w) < 1e-9


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_box_and_region_move_with_the_image(resize):
    """A white rectangle stays inside its box and region whatever the size becomes."""
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:30, 32:52] = 255
    region = (image[..., 0] > 0).astype(np.uint8)
    box = np.array([10 / 40, 32 / 80, 30 / 40, 52 / 80], np.float32)
    read = lambda i: {"image": image, "label": 0, "region": region, "box": box}
    source = data.Source("one()", "all", ("a",), 1, read, None, ("box", "region"))
    row = data.decode(source, 0, (20, 20), resize)
    columns = (8, 13) if resize == "stretch" else (6, 16)  # the crop takes columns 20 to 60 of the 80
    np.testing.assert_allclose(row["box"] * 20, [5, columns[0], 15, columns[1]], rtol=1e-6)
    np.testing.assert_array_equal(row["region"].nonzero()[0], np.repeat(np.arange(5, 15), columns[1] - columns[0]))
    np.testing.assert_array_equal(row["region"] == 1, row["image"][..., 0] > 127)
    assert image.shape == (40, 80, 3) and set(data.decode(source, 0, (20, 20), resize, extras=False)) == {
        "image",
        "label",
    }
    same = data.decode(source, 0, (40, 80), resize)
    np.testing.assert_array_equal(same["image"], image)


def test_an_unknown_resize_names_the_choices():
    with pytest.raises(
        UserError, match=r"resize 'crup' is unknown; did you mean 'crop'\? choose from centre, crop, stretch"
    ):
        data.decode(memory_source(h=3, w=3), 0, (3, 3), "crup")


def test_a_wrong_image_says_what_it_is():
    source = data.Source("grey()", "all", ("a",), 1, lambda i: {"image": np.zeros((4, 4), np.uint8), "label": 0})
    with pytest.raises(
        UserError, match=r"grey\(\) split 'all' index 0: the image must be uint8 \(h, w, 3\), it is uint8 \(4, 4\)"
    ):
        source[0]


def test_a_wrong_record_of_a_users_own_says_what_it_is():
    image = np.zeros((4, 4, 3), np.uint8)
    for record, words in (
        ({"image": image}, "the record has no 'label'"),
        ({"image": jnp.asarray(image), "label": 0}, "the image must be a NumPy array, it is ArrayImpl"),
        ({"image": image, "label": np.array([0])}, "the label must be a whole number, it is ndarray"),
    ):
        source = data.Source("own()", "all", ["a", "b"], 1, lambda i, record=record: record)
        assert source.classes == ("a", "b"), "as a run remembers them, else it would not go on"
        with pytest.raises(UserError, match=rf"own\(\) split 'all' index 0: {words}"):
            source[0]


def test_resident_reads_all_and_tells_progress():
    source, told = memory_source(n=150), []
    arrays = data.resident(source, (6, 5), progress=lambda done, total: told.append((done, total)))
    assert told == [(64, 150), (128, 150), (150, 150)]
    assert {key: (value.dtype.name, value.shape) for key, value in arrays.items()} == {
        "image": ("uint8", (150, 6, 5, 3)),
        "label": ("int32", (150,)),
        "group": ("int32", (150,)),
    }
    np.testing.assert_array_equal(arrays["image"][77], picture(77, 6, 5))
    np.testing.assert_array_equal(arrays["label"], np.arange(150) % 4)
    assert data.memory(source, (6, 5)) == sum(value.nbytes for value in arrays.values())
    assert set(data.resident(source, (6, 5), extras=False)) == {"image", "label"}


def test_gather_makes_a_batch_inside_jit():
    arrays = data.resident(memory_source(), (6, 5))
    ids, mask = np.array([5, 0, 22], np.int32), np.array([True, True, False])
    batch = jax.jit(data.gather, static_argnums=3)(arrays, ids, mask, 4)
    np.testing.assert_allclose(batch["image"], np.stack([picture(i, 6, 5) for i in ids]) / 255, rtol=1e-6)
    np.testing.assert_array_equal(batch["targets"], np.eye(4, dtype=np.float32)[[1, 0, 2]])
    assert batch["label"].tolist() == [1, 0, 2] and batch["group"].tolist() == [1, 0, 0]
    assert batch["id"].tolist() == [5, 0, 22] and batch["mask"].tolist() == [True, True, False]
    unlabelled = data.as_batch({"image": np.zeros((1, 2, 2, 3), np.uint8), "label": np.array([-1])}, 3)
    assert unlabelled["targets"].tolist() == [[0, 0, 0]]


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 12))
def test_an_epoch_is_a_permutation_without_the_rest(epoch, n, batch):
    ids = data.epoch_ids(3, epoch, n, batch)
    assert ids.shape == (max(1, n // batch), batch) and ids.dtype == np.int32
    assert len(set(ids.ravel().tolist())) == min(n, ids.size) and ids.min() >= 0 and ids.max() < n
    np.testing.assert_array_equal(ids, data.epoch_ids(3, epoch, n, batch))


def test_epochs_and_seeds_differ():
    orders = {data.epoch_ids(seed, epoch, 40, 10).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 40), st.integers(1, 12))
def test_evaluation_meets_every_row_once(n, batch):
    batches = list(data.evaluation_batches(n, batch))
    assert all(ids.shape == mask.shape == (batch,) and ids.dtype == np.int32 for ids, mask in batches)
    assert [i for ids, mask in batches for i in ids[mask]] == list(range(n))
    assert all((ids[~mask] == 0).all() for ids, mask in batches)


def same_rows(left, right):
    assert set(left) == set(right)
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])
        assert left[key].dtype == right[key].dtype


def test_a_stream_gives_what_the_resident_set_gives():
    source = memory_source(n=23)
    arrays = data.resident(source, (4, 4), "crop", extras=False)
    order = np.concatenate([data.epoch_ids(7, epoch, 23, 5) for epoch in range(3)])
    with data.stream(source, (4, 4), "crop", seed=7, batch=5) as batches:
        for ids, rows in zip(order, batches):
            expected = {**{key: value[ids] for key, value in arrays.items()}, "id": ids, "mask": np.ones(5, bool)}
            same_rows(rows, expected)


def test_small_pictures_are_decoded_by_one_thread():
    """Declared, or as the first record is; what is broken decides nothing."""
    cores = min(len(os.sched_getaffinity(0)), 16)
    picture = lambda side: {"image": np.zeros((side, side, 3), np.uint8), "label": 0}
    of = lambda read, size=None: data.Source("sizes()", "all", ("a",), 3, read, size)
    assert threads_for(of(None, (128, 128))) == 1 and threads_for(of(None, (128, 129))) == cores
    assert threads_for(of(lambda i: picture(32))) == 1 and threads_for(of(lambda i: picture(200))) == cores
    assert threads_for(of(lambda i: 1 / 0)) == cores


def test_a_stream_goes_on_exactly_where_it_stood():
    make = lambda: data.stream(memory_source(n=23), (6, 5), seed=1, batch=5, threads=2)
    with make() as whole:
        reference = [next(whole) for _ in range(9)]
    with make() as first:
        for _ in range(6):  # into the second epoch of four batches
            next(first)
        state = json.loads(json.dumps(first.get_state()))
    with make() as second:
        second.set_state(state)
        for expected in reference[6:]:
            same_rows(next(second), expected)
        second.set_state({"step": 2})  # back, with threads already running
        same_rows(next(second), reference[2])


def test_processes_share_every_batch():
    whole = data.stream(memory_source(), (6, 5), seed=1, batch=6)
    parts = [data.stream(memory_source(), (6, 5), seed=1, batch=6, process=(i, 2)) for i in range(2)]
    with whole, parts[0], parts[1]:
        for _ in range(5):
            halves = [next(part) for part in parts]
            same_rows(next(whole), {key: np.concatenate([half[key] for half in halves]) for key in halves[0]})
    with pytest.raises(UserError, match="batch 5 does not divide among 2 processes; give a multiple of 2"):
        data.stream(memory_source(), (6, 5), seed=1, batch=5, process=(0, 2))


def test_an_evaluation_stream_pads_and_ends():
    source = memory_source(n=7)
    arrays = data.resident(source, (6, 5))
    with data.evaluation_stream(source, (6, 5), batch=3) as batches:
        got = list(batches)
    assert len(got) == 3
    for rows, (ids, mask) in zip(got, data.evaluation_batches(7, 3)):
        same_rows(rows, {**{key: value[ids] for key, value in arrays.items()}, "id": ids, "mask": mask})


def test_a_broken_record_ends_a_stream_with_its_name():
    with data.evaluation_stream(memory_source(broken=4), (6, 5), batch=3) as batches:
        next(batches)
        with pytest.raises(UserError, match=r"^memory\(\) split 'train' index 4 cannot be decoded: no such bytes$"):
            next(batches)


def test_a_stream_reads_only_a_bounded_number_of_records_ahead():
    reads = []
    source = memory_source(n=4000)
    counted = data.Source("counted()", "all", source.classes, 4000, lambda i: reads.append(i) or source.read(i))
    with data.evaluation_stream(counted, (6, 5), batch=4, threads=2) as batches:
        for taken in range(1, 30):
            next(batches)
            assert len(reads) <= 4 * taken + 2 * 4 + 2  # what was given, the buffer of two batches, one in each thread


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_errors(tmp_path):
    """In a process of its own: grain's workers start new interpreters, and warn of leaked shared memory at their
    end."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert run.stdout.split("\n")[:2] == [
        "7 equal",
        "shapes() split 'train' index 20 cannot be decoded: no such bytes",
    ], run.stderr


WORKERS = """
import dataclasses
import numpy as np
from topgap_jax import data

def read(i):
    if i == 20:
        raise ValueError("no such bytes")
    return source.read(i)

if __name__ == "__main__":
    source = data.shapes(train=40)("train")
    options = {"seed": 2, "batch": 8}
    with data.stream(source, (16, 16), **options, workers=2) as many, data.stream(source, (16, 16), **options) as one:
        many.set_state({"step": 3}), one.set_state({"step": 3})
        equal = sum(all(np.array_equal(a[k], b[k]) for k in a) for a, b, _ in zip(many, one, range(7)))
    print(equal, "equal")
    try:
        list(data.evaluation_stream(dataclasses.replace(source, read=read), (16, 16), batch=8, workers=2))
    except data.source.UserError as error:
        print(error)
"""


def test_the_stream_and_the_batch_meet_in_one_step():
    with data.stream(memory_source(), (6, 5), seed=0, batch=4) as batches:
        batch = jax.jit(data.as_batch, static_argnums=1)(next(batches), 4)
    assert batch["image"].dtype == jnp.float32 and batch["targets"].shape == (4, 4) and float(batch["image"].max()) <= 1
