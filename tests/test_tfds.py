"""TFDS sets: small ones, written here as ArrayRecord without TensorFlow, and the real ones of TOPGAP_DATA."""

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.utils.shard_utils import FileInstruction
from tensorflow_datasets.proto import tf_example_pb2

from topgap_jax import data
from topgap_jax.build import build
from topgap_jax.data.tfds import _Records
from topgap_jax.errors import UserError

BOX = (0.25, 0.5, 0.75, 1.0)
CORE = "tensorflow_datasets.core.features"


def png(image: np.ndarray) -> bytes:
    """An image array as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _image(channels: int):
    shape = {"dimensions": ["-1", "-1", str(channels)]}
    image = {"dtype": "uint8", "encodingFormat": "png", "shape": shape}
    return {"image": image, "pythonClassName": f"{CORE}.image_feature.Image"}


FEATURES = {
    "image": _image(3),
    "mask": _image(1),
    "label": {"classLabel": {"numClasses": "2"}, "pythonClassName": f"{CORE}.class_label_feature.ClassLabel"},
    "bbox": {
        "boundingBox": {"bboxFormat": "REL_YXYX", "dtype": "float32", "shape": {"dimensions": ["4"]}},
        "pythonClassName": f"{CORE}.bounding_boxes.BBoxFeature",
    },
}


def write_set(root, splits: dict[str, list[dict]], name: str = "tiny", file_format: str = "array_record"):
    """root/name/1.0.0 with splits {name: [{image bytes, mask bytes, label, bbox}, ...]}; the classes are cat and
    dog."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    features = {"featuresDict": {"features": FEATURES}, "pythonClassName": f"{CORE}.features_dict.FeaturesDict"}
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "label.labels.txt").write_text("cat\ndog\n")
    infos = []
    for split, records in splits.items():
        path = folder / f"{name}-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            example = tf_example_pb2.Example()
            for key, value in record.items():
                feature = example.features.feature[key]
                if isinstance(value, bytes):
                    feature.bytes_list.value.append(value)
                elif isinstance(value, int):
                    feature.int64_list.value.append(value)
                else:
                    feature.float_list.value.extend(value)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(len(records))]
        infos.append({"name": split, "filepathTemplate": template, "numBytes": "1", "shardLengths": lengths})
    info = {"name": name, "version": "1.0.0", "fileFormat": file_format, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def picture(i, h=12, w=16):
    return np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)


def record(i, **changes):
    mask = np.full((12, 16, 1), 2, np.uint8)
    mask[3:9, 8:] = 1
    mask[9] = 3
    return {"image": png(picture(i)), "label": i % 2, "mask": png(mask[..., 0]), "bbox": BOX, **changes}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPGAP_DATA", str(tmp_path))
    write_set(tmp_path / "tfds", {"train": [record(i) for i in range(10)], "test": [record(i) for i in range(3)]})
    return tmp_path


def test_tfds_reads_image_label_box_and_region(root):
    splits = data.tfds("tiny", box="bbox", region="mask")
    source = splits("train[2:6]")
    assert (source.classes, len(source), source.offers) == (("cat", "dog"), 4, ("box", "region"))
    first = source[0]
    np.testing.assert_array_equal(first["image"], picture(2))
    np.testing.assert_allclose(first["box"], BOX)
    assert (first["label"], first["region"].shape) == (0, (12, 16))
    assert (first["region"][4, 9], first["region"][0, 0], first["region"][9, 0]) == (1, 0, 2)
    assert [len(each) for each in map(splits, ("train[80%:]", "train+test", "test"))] == [2, 13, 3]
    assert len(list(source)) == 4


def changed_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        (
            "features.json",
            lambda tree: tree["featuresDict"]["features"]["image"].update(pythonClassName="stranger.module.Image"),
            "features.json names the class 'stranger.module.Image'; only those of TFDS, ",
        ),
        ("features.json", lambda tree: tree.update(type="stranger.Dict"), "names the class 'stranger.Dict'"),
        (
            "features.json",
            lambda tree: tree["featuresDict"]["features"]["bbox"]["boundingBox"].update(bboxFormat="XYWH"),
            "'bbox' holds boxes in the form XYWH; a box is (ymin, xmin, ymax, xmax) in [0, 1], TFDS's form REL_YXYX",
        ),
        (
            "dataset_info.json",
            lambda tree: tree["splits"][0].update(shardLengths=["7"]),
            "00000-of-00001 holds 10 records, dataset_info.json says 7; prepare it again",
        ),
        (
            "dataset_info.json",
            lambda tree: tree["splits"][0].update(shardLengths=["12"]),
            "00000-of-00001 holds 10 records, dataset_info.json says 12; prepare it again",
        ),
        (
            "features.json",
            lambda tree: tree.update(
                pythonClassName=f"{CORE}.bounding_boxes.BBoxFeature", boundingBox=tree.clear() or {}
            ),
            "describes no dictionary of features, but BBoxFeature",
        ),
        ("dataset_info.json", lambda tree: tree.pop("splits"), "has no splits: its dataset_info.json names none"),
    ],
)
def test_what_a_strangers_set_says_of_itself_is_checked(file, change, text, root, tmp_path, monkeypatch):
    """No module is imported that it names, no box is read in another form, no record is dropped in silence."""
    module = tmp_path / "stranger.py"
    module.write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    changed_json(root / "tfds" / "tiny" / "1.0.0" / file, change)
    with pytest.raises(UserError) as raised:
        data.tfds("tiny", box="bbox")("train[:5]")
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_a_set_that_names_no_files_is_a_line(root):
    changed_json(root / "tfds" / "tiny" / "1.0.0" / "dataset_info.json", lambda tree: tree.pop("name"))
    with pytest.raises(UserError, match=r"tfds\('tiny'\): split 'train' names no files: Could not format template"):
        data.tfds("tiny")("train")


def test_records_of_several_files_are_those_of_array_records_own_source(tmp_path):
    """Parts of files, any thread, a pickled copy; a file may hold several records a group."""
    parts = []
    for number, (length, skip, take, group) in enumerate(((50, 3, 40, 1), (1, 0, 1, 1), (70, 0, -1, 1), (9, 8, 1, 4))):
        path = tmp_path / f"{number}.array_record"
        writer = ArrayRecordWriter(str(path), f"group_size:{group},uncompressed")
        for i in range(length):
            writer.write(f"{number} {i}".encode() * (i + 1))
        writer.close()
        parts.append(FileInstruction(str(path), skip, take, length))
    records = _Records(parts)
    expected = [
        f"{number} {part.skip + i}".encode() * (part.skip + i + 1)
        for number, part in enumerate(parts)
        for i in range(part.take)
    ]
    assert len(expected) == 112 and [records[i] for i in range(112)] == expected
    tfds_own = ArrayRecordDataSource(parts[:3])
    assert [tfds_own[i] for i in range(111)] == expected[:111]
    order = np.random.default_rng(0).integers(0, 112, 2000).tolist()
    copy = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, order)) == [expected[i] for i in order]


def test_tfds_finds_a_set_by_name_version_and_folder(root):
    folder = root / "tfds" / "tiny"
    for name in ("tiny", "tiny:1.0.0", str(folder), str(folder / "1.0.0")):
        assert len(data.tfds(name)("test")) == 3
    write_set(root / "tfds" / "new", {"train": [record(0)]}, name="tiny").parent.rename(root / "tfds" / "config")
    assert len(data.tfds("config")("train")) == 1


def test_the_newest_version_is_taken(root):
    newer = write_set(root / "later", {"train": [record(0)]}, name="tiny")
    newer.rename(root / "tfds" / "tiny" / "1.10.0")
    assert len(data.tfds("tiny")("train")) == 1
    assert len(data.tfds("tiny:1.0.0")("train")) == 10


@pytest.mark.parametrize(
    "text, split, said",
    [
        ("tfds('tinny')", "train", r"tfds\('tinny'\) is not prepared in .* did you mean 'tiny'\? choose from tiny$"),
        ("tfds('tiny:2.0.0')", "train", r"tfds\('tiny:2.0.0'\) is not prepared in"),
        (
            "tfds('tiny', box='boxes')",
            "train",
            r"no feature 'boxes' to use as box; .* choose from bbox, image, label, mask",
        ),
        (
            "tfds('tiny', region_values=(1, 2))",
            "train",
            r"region_values are three \(inside, outside, unsure\), got \(1, 2\)",
        ),
        (
            "tfds('tiny', image='bbox')",
            "train",
            r"'bbox' holds float32 of shape \(4,\); an image is uint8, \(h, w, 3\)",
        ),
        ("tfds('tiny', label='bbox')", "train", r"the label is a plain BBoxFeature; give classes="),
        (
            "tfds('tiny')",
            "trian",
            r"tfds\('tiny'\) has no split 'trian'; did you mean 'train'\? choose from test, train",
        ),
        ("tfds('tiny')", "train[:50]", r"tfds\('tiny'\) split 'train\[:50\]': .*incompatible with 10 examples"),
        ("tfds('tiny')", "train[x]", r"tfds\('tiny'\) split 'train\[x\]': "),
        ("tfds('tiny')", "train[:0]", r"tfds\('tiny'\) split 'train\[:0\]' is empty"),
    ],
)
def test_a_wrong_set_split_or_key_is_one_line(root, text, split, said):
    with pytest.raises(UserError, match=said) as error:
        build(text, data.TABLE, {}, "config.source")(split)
    assert "\n" not in str(error.value)


def test_a_set_prepared_in_another_format_says_so(tmp_path):
    folder = write_set(tmp_path, {"train": [record(0)]}, file_format="tfrecord")
    with pytest.raises(UserError, match="is prepared as tfrecord; prepare it with file_format='array_record'"):
        data.tfds(str(folder))


def test_a_folder_that_cannot_be_read_says_so(tmp_path):
    folder = write_set(tmp_path, {"train": [record(0)]})
    (folder / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"tiny/1.0.0 cannot be read: "):
        data.tfds(str(folder))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"image": b"no image"}, "cannot be decoded: "),
        ({"image": png(picture(0))[:200]}, "cannot be decoded: "),
        ({"label": 7}, r"label 7 is not in 0\.\.1"),
        ({"label": -1}, r"label -1 is not in 0\.\.1"),
        ({"bbox": (0.5, 0.0, 0.2, 1.0)}, r"box \[0.5, 0.0, 0.2, 1.0\] is not \(ymin, xmin, ymax, xmax\) in \[0, 1\]"),
        (
            {"mask": png(np.full((12, 16), 9, np.uint8))},
            r"its mask holds 9, which is none of region_values=\(1, 2, 3\)",
        ),
        ({"mask": png(np.ones((5, 5), np.uint8))}, r"the region has shape \(5, 5\), its image \(12, 16\)"),
    ],
)
def test_a_bad_record_names_set_split_and_index(tmp_path, changes, said):
    folder = write_set(tmp_path, {"train": [record(0), record(1, **changes)]})
    source = data.tfds(str(folder), box="bbox", region="mask")("train")
    with pytest.raises(UserError, match=r"tiny/1.0.0'\) split 'train' index 1:? " + said) as error:
        data.resident(source, (8, 8))
    assert "\n" not in str(error.value)


def test_cifar10_is_the_original_one(topgap_data):
    """Labels, pixels and order of the published batches; `train[:45000]` and the rest are all of train."""
    splits = data.tfds("cifar10")
    test = splits("test")
    assert (len(test), test.image_size, test.classes[3], test.offers) == (10_000, (32, 32), "cat", ())
    assert [test[i]["label"] for i in range(10)] == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert test[0]["image"][0, :3].tolist() == [[158, 112, 49], [159, 111, 47], [165, 116, 51]]
    assert test[7]["name"] == "test_00007"
    first, rest = splits("train[:45000]"), splits("train[45000:]")
    assert (len(first), len(rest), rest[0]["name"]) == (45_000, 5_000, "train_45000")


@pytest.mark.slow
def test_all_of_cifar10_decodes_to_the_published_sum(topgap_data):
    arrays = data.resident(data.tfds("cifar10")("test"), (32, 32))
    assert int(arrays["image"].astype(np.int64).sum()) == 3_733_375_634
    assert np.bincount(arrays["label"]).tolist() == [1000] * 10


def test_pets3_masks_and_boxes(topgap_data):
    splits = data.tfds("pets3", box="bbox", region="mask")
    train, test = splits("train"), splits("test")
    assert (len(train), len(test), train.image_size) == (300, 298, None)
    assert train.classes == ("Abyssinian", "american_bulldog", "Bengal")
    raw = train[0]
    arrays = data.resident(splits("train[:100]"), (64, 64), "crop")
    assert raw["region"].shape == raw["image"].shape[:2] and min(raw["image"].shape[:2]) == 144
    assert set(np.unique(arrays["region"])) == {0, 1, 2}
    assert 0.2 < (arrays["region"] == 1).mean() < 0.5  # .28 of whole images, more of their centres
    ymin, xmin, ymax, xmax = arrays["box"].T
    assert (ymin < ymax).all() and (xmin < xmax).all() and arrays["box"].min() >= 0 and arrays["box"].max() <= 1
    # the box is tight round the trimap's inside and border
    rows, columns = np.nonzero(raw["region"] > 0)
    h, w = raw["region"].shape
    tight = [rows.min() / h, columns.min() / w, (rows.max() + 1) / h, (columns.max() + 1) / w]
    np.testing.assert_allclose(raw["box"], tight, atol=2 / 144)


@pytest.mark.parametrize(
    "name, sizes, classes, side", [("tiny_imagenet20", (5000, 1000), 20, 64), ("gtsrb32", (5996, 2000), 43, 32)]
)
def test_sets_with_boxes(topgap_data, name, sizes, classes, side):
    splits = data.tfds(name, box="bbox")
    sources = [splits("train"), splits("validation" if name == "tiny_imagenet20" else "test")]
    assert tuple(map(len, sources)) == sizes
    for source in sources:
        assert len(source.classes) == classes
        record = source[len(source) - 1]  # reading checks label and box
        assert record["image"].shape == (side, side, 3) and (record["box"][2:] > record["box"][:2]).all()
