"""Files of weights: PyTorch's own, written here byte by byte as PyTorch writes them; hostile ones; a hub's config.json.

tests/test_pretrained.py has names and networks; experiments/parity_weight_files.py compares with torch.load.
"""

import io
import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from topgap_jax import pretrained
from topgap_jax.errors import UserError
from topgap_jax.pretrained import files, pth, saved

TYPES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
}  # fmt: skip


class Global:
    """A name in a pickle, written as PyTorch's pickler writes a global."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Stored:
    """A persistent id."""

    def __init__(self, *identity):
        self.identity = identity


def written(value) -> bytes:
    """The opcodes of protocol 2 that make `value`."""
    if isinstance(value, Global):
        return value.text
    if isinstance(value, Call):
        return written(value.function) + written(value.arguments) + b"R"
    if isinstance(value, Stored):
        return written(value.identity) + b"Q"
    if isinstance(value, OrderedDict):
        items = b"".join(written(key) + written(item) for key, item in value.items())
        return b"ccollections\nOrderedDict\n)R(" + items + b"u}" + written("_metadata") + b"}sb"
    if isinstance(value, dict):
        return b"}(" + b"".join(written(key) + written(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(written, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(written, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]  # a number, a text, None: without protocol and stop


def tensor(key, kind, size, offset, shape, strides, rebuild=("torch._utils", "_rebuild_tensor_v2")):
    storage = Stored("storage", Global("torch", kind), key, "cpu", size, *VIEW)
    return Call(Global(*rebuild), storage, offset, shape, strides, False, Call(Global("collections", "OrderedDict")))


VIEW: list = []  # what the legacy form has at the end of a storage's identity


def zipped(path, tree, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + written(tree) + b".")
        archive.writestr("archive/byteorder", b"little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", b"3\n")


def legacy(path, tree, storages):
    VIEW.append(None)
    try:
        body = b"\x80\x02" + written(tree) + b"."
    finally:
        VIEW.clear()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(pth.MAGIC, 2), pickle.dumps(1001, 2), pickle.dumps(system, 2), body]
    parts += [pickle.dumps(sorted(storages), 2)]
    parts += [struct.pack("<q", values.size) + values.tobytes() for _, values in sorted(storages.items())]
    path.write_bytes(b"".join(parts))


FORMS = pytest.mark.parametrize("write", [zipped, legacy])


@FORMS
def test_a_buffer_and_names_of_python_2(tmp_path, write):
    """A tensor of a class of its own, and what PyTorch's pickler calls `__builtin__`."""
    plain = tensor("0", "FloatStorage", 4, 0, (4,), (1,))
    rebuilt = Call(Global("torch._tensor", "_rebuild_from_type_v2"), plain.function, Global("torch.nn.parameter", "Buffer"),
                   plain.arguments, {})  # fmt: skip
    beside = Call(Global("collections", "defaultdict"), Global("__builtin__", "list"))
    write(tmp_path / "w.pth", {"a": rebuilt, "beside": beside}, {"0": np.arange(4, dtype=np.float32)})
    np.testing.assert_array_equal(files.tensors(tmp_path / "w.pth")["a"], np.arange(4))


@FORMS
def test_strides_offsets_shared_storages_and_types(tmp_path, write):
    storages = {str(i): np.arange(24).astype(kind) for i, kind in enumerate(TYPES.values())}
    plain = np.arange(24).reshape(2, 3, 4)
    at = lambda i, *place: tensor(str(i), list(TYPES)[i], 24, *place)
    tree = OrderedDict(
        {
            "whole": at(0, 0, (2, 3, 4), (12, 4, 1)),
            "transposed": at(0, 0, (4, 3, 2), (1, 4, 12)),
            "part": at(0, 5, (2, 2), (4, 1)),
            "scalar": at(0, 7, (), ()),
            "none": at(0, 0, (0, 3), (3, 1)),
            "repeated": at(0, 2, (5, 2), (0, 1)),
            "half": at(1, 0, (24,), (1,)),
            "bfloat16": at(2, 0, (6, 4), (4, 1)),
            "double": Call(Global("torch._utils", "_rebuild_parameter"), at(3, 0, (24,), (1,)), True, OrderedDict()),
        }
    )
    path = tmp_path / "w.pth"
    write(path, tree, storages)
    expected = {
        "whole": plain, "transposed": plain.T, "part": [[5, 6], [9, 10]], "scalar": 7, "none": np.zeros((0, 3)),
        "repeated": [[2, 3]] * 5, "half": np.arange(24), "bfloat16": np.arange(24).reshape(6, 4),
        "double": np.arange(24),
    }  # fmt: skip
    arrays = pretrained.tensors(path)
    assert list(arrays) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(np.float64(arrays[name]), values, name)
        assert pretrained.read(path).shapes[name] == arrays[name].shape
    assert [str(arrays[name].dtype) for name in ("part", "half", "bfloat16", "double")] == [
        "float32", "float16", "bfloat16", "float64",
    ]  # fmt: skip


@FORMS
def test_a_checkpoint_with_training_state(tmp_path, write):
    """The network's dictionary is read; an optimiser's state and objects that are no tensors are passed over."""
    one = lambda: tensor("0", "FloatStorage", 2, 0, (2,), (1,))
    arguments = Call(Global("argparse", "Namespace"))
    network = OrderedDict(
        {"module.a.weight": one(), "module.a.num_batches_tracked": tensor("1", "LongStorage", 1, 0, (), ())}
    )
    tree = {
        "epoch": 3,
        "args": arguments,
        "best": Call(Global("numpy.core.multiarray", "scalar"), Call(Global("numpy", "dtype"), "f8"), b"12345678"),
        "state_dict": network,
        "optimizer": {"state": {0: {"momentum_buffer": one()}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    path = tmp_path / "w.tar"
    write(path, tree, {"0": np.float32([1, 2]), "1": np.int64([9])})
    described = pretrained.read(path)
    assert dict(described.shapes) == {"a.weight": (2,)}
    assert described.notes == ("its network is 'state_dict'", "'module.' was taken off its names")
    np.testing.assert_array_equal(pretrained.tensors(path)["a.weight"], [1, 2])


def error(path, function=pretrained.tensors) -> str:
    with pytest.raises(UserError) as caught:
        function(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


BAD = {
    "beyond its storage": (tensor("0", "FloatStorage", 4, 1, (4,), (1,)), "reaches beyond the 4 numbers"),
    "by its strides": (tensor("0", "FloatStorage", 4, 0, (2, 2), (3, 1)), "reaches beyond the 4 numbers"),
    "negative strides": (tensor("0", "FloatStorage", 4, 3, (4,), (-1,)), "offset, shape or strides"),
    "negative sizes": (tensor("0", "FloatStorage", 4, 0, (-4,), (1,)), "offset, shape or strides"),
    "a size that is a truth": (tensor("0", "FloatStorage", 4, 0, (True,), (1,)), "offset, shape or strides"),
    "more axes than strides": (tensor("0", "FloatStorage", 4, 0, (2, 2), (1,)), "offset, shape or strides"),
    "repeated without end": (tensor("0", "FloatStorage", 4, 0, (2**60, 2), (0, 1)), "larger than any memory"),
    "a storage larger than the file": (tensor("0", "FloatStorage", 2**50, 0, (4,), (1,)), "has not the"),
    "two sizes of a storage": (
        [tensor("0", "FloatStorage", 4, 0, (4,), (1,)), tensor("0", "FloatStorage", 3, 0, (3,), (1,))],
        "has two types or sizes",
    ),
    "a few numbers expanded to a terabyte": (
        tensor("0", "FloatStorage", 4, 0, (2**40,), (0,)), "'a' repeats 4 numbers to 1099511627776, which no weights do",
    ),
    "a tensor with attributes of another call": (
        Call(Global("torch._tensor", "_rebuild_from_type_v2"), Global("torch", "Size"), Global("torch", "Tensor"), (), {}),
        "a tensor with attributes is not what it should be",
    ),
    "integers": (tensor("0", "IntStorage", 4, 0, (4,), (1,)), "'a' is of type int32"),
    "another name": (Call(Global("os", "system"), "echo hostile"), "its pickle names 'os.system', which no file of"),
    "a builtin": (Call(Global("builtins", "eval"), "1"), "its pickle names 'builtins.eval'"),
    "a network": (Global("torchvision.models.resnet", "ResNet"), "torch.save(model.state_dict(), FILE) writes one"),
    "a call of a text": (Call("text", 1), "calls what is no function"),
    "a call with other arguments": (Call(Global("torch._utils", "_rebuild_tensor_v2"), 1), "is not read as a file of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@FORMS
def test_what_no_file_of_tensors_holds(tmp_path, kind, write):
    value, text = BAD[kind]
    path = tmp_path / "w.pth"
    write(path, {"a": value}, {"0": np.zeros(4, np.float32)})
    assert text in error(path)


PICKLES = {
    "nested without end": (b"](" * 100_000 + b"e" * 100_000, "holds no tensors"),
    "tuples in tuples": (b")" + b"\x85" * 1_000_000, "holds no tensors"),
    "dictionaries in dictionaries": (b"}" + b"(X\x01\x00\x00\x00a}" * 100 + b"u" * 100, "nested too deep"),
    "doubled fifty times": (
        b"}q\x00" + b"".join(b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cuq%c" % (i, i, i + 1) for i in range(50)),
        "",
    ),
    "a memo far away": (b"Nr\xff\xff\xff\xff", "holds no tensors"),
    "a memo that is not there": (b"j\xff\xff\xff\xff", "is not read as a file"),
    "a text longer than the file": (b"X\xff\xff\xff\x7fa", "is not read as a file"),
    "a text of 2^63 letters": (b"\x8d" + b"\xff" * 7 + b"\x7fa", "is not read as a file"),
    "an empty stack": (b"R", "takes from an empty stack"),
    "a mark too few": (b"t", "is not read as a file"),
    "INST": (b"(ios\nsystem\n", "holds the operation INST"),
    "an extension": (b"\x82\x01", "holds the operation EXT1"),
    "STACK_GLOBAL": (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "names 'os.system'"),
    "a key twice": (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu", "holds 'a' twice"),
    "tuples as keys": (b"})" + b"\x85" * 1_000_000 + b"Ns", "holds no tensors"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_hostile_pickles(tmp_path, kind):
    body, text = PICKLES[kind]
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
    assert text in error(path)


def test_hostile_zips(tmp_path):
    path = tmp_path / "w.pth"
    tree, storages = {"a": tensor("0", "FloatStorage", 4, 0, (4,), (1,))}, {"0": np.zeros(4, np.float32)}
    zipped(path, tree, storages, zipfile.ZIP_DEFLATED)
    assert "is compressed, which PyTorch never does" in error(path)
    zipped(path, tree, {})
    assert "storage '0' has not the 4 numbers" in error(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    assert "no single NAME/data.pkl" in error(path)
    path.write_bytes(b"PK\x03\x04 and nothing")
    assert "is not read as a file of PyTorch's" in error(path)
    path.write_bytes(b"not PyTorch's at all")
    assert "neither of its zip form nor of its legacy form" in error(path)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".npz", ".safetensors"])
def test_damaged_files_give_one_line(tmp_path_factory, suffix):
    """Cut anywhere, or one byte changed: the numbers, or a UserError of one line; never anything else."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"w{suffix}"
    arrays = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.bias": np.zeros(2, np.float16)}
    if suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".safetensors":
        save_file(arrays, path)
    else:
        tree = {
            "a.weight": tensor("0", "FloatStorage", 12, 0, (3, 4), (1, 3)),
            "b.bias": tensor("1", "HalfStorage", 2, 0, (2,), (1,)),
        }
        storages = {"0": arrays["a.weight"], "1": arrays["b.bias"]}
        (zipped if suffix == ".pth" else legacy)(path, tree, storages)
    good = path.read_bytes()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, len(good) - 1), st.integers(0, 255), st.booleans())
    def damaged(place, byte, cut):
        path.write_bytes(good[:place] if cut else good[:place] + bytes([byte]) + good[place + 1 :])
        for function in (pretrained.describe, pretrained.tensors):
            try:
                function(path)
            except UserError as error:
                assert "\n" not in str(error)

    damaged()


def test_every_flipped_bit_of_a_file_of_ours_is_noticed(tmp_path):
    """Or it changes no number: those of the checksum's own name in the metadata. The order of the tensors is kept."""
    path = tmp_path / "w.safetensors"
    arrays = {"params": {"b": {"kernel": np.float32([[1, 2], [3, 4]]).T}, "a": np.float32(5)}}
    pretrained.save(path, arrays, metadata={"mean": "0.5,0.5,0.5"})
    assert pretrained.read(path).shapes == {"params/a": (), "params/b/kernel": (2, 2)}
    expected, good, silent = pretrained.tensors(path), path.read_bytes(), set()
    np.testing.assert_array_equal(expected["params/b/kernel"], arrays["params"]["b"]["kernel"])
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            values = pretrained.tensors(path)
        except UserError as caught:
            assert "\n" not in str(caught)
            continue
        assert {name: value.tolist() for name, value in values.items()} == {
            name: value.tolist() for name, value in expected.items()
        }
        silent.add(bit // 8)
    place = good.index(saved.KEY.encode())
    assert silent <= set(range(place, place + len(saved.KEY)))
    path.write_bytes(good[:-1] + b"\0")
    assert "w.safetensors is damaged: its checksum is " in error(path)
    save_file({"a": np.zeros(1, np.float32)}, path)  # of others
    assert list(pretrained.tensors(path)) == ["a"]
    for wrong, text in (("w.npz", "w.npz: weights are written to a .safetensors file, not to '.npz'"),
                        ("no/w.safetensors", "no/w.safetensors': No such file or directory")):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(text)):
            pretrained.save(tmp_path / wrong, arrays)


def test_npz_of_bfloat16_and_claims(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.float32([1.5, -2]).astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.float32(pretrained.tensors(path)["a"]), [1.5, -2])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    assert "'a.npy' claims 4000000000000000 bytes" in error(path, pretrained.describe)


@pytest.mark.parametrize(
    "arrays, text",
    [
        ({"module.a": [1.0], "a": [1.0]}, "holds both 'module.a' and 'a'"),
        ({"a": np.int8([1])}, "'a' is of type int8"),
        ({"a": np.array([True])}, "'a' is of type bool"),
        ({"a": np.array(["text"])}, "'a' is of type <U4"),
        ({"a": np.complex64([1])}, "'a' is of type complex64"),
        ({"a": [float("nan")]}, "'a' holds numbers that are not finite"),
        ({"a": [float("inf")]}, "'a' holds numbers that are not finite"),
        ({"bn1.running_var": [-1.0]}, "'bn1.running_var' is negative, which no variance is"),
    ],
)
def test_what_weights_cannot_be(tmp_path, arrays, text):
    path = tmp_path / "w.npz"
    np.savez(path, **arrays)
    assert text in error(path)


def test_one_name_twice(tmp_path):
    path = tmp_path / "w.npz"
    one = io.BytesIO()
    np.save(one, np.float32([1]))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", one.getvalue())
        archive.writestr("a.npy", one.getvalue())
    assert "stands in it twice" in error(path)
    path = tmp_path / "w.safetensors"
    place = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{place},"a":{place}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "twice" in error(path) or "duplicate" in error(path)


def test_numbers_that_float32_does_not_hold(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([1e300]))
    with pytest.raises(UserError, match="'a' holds numbers that are too large for float32"):
        files.tensors(tmp_path / "w.npz")


def test_prefixes_are_taken_off_and_said(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **{"module._orig_mod.a.weight": [1.0], "module._orig_mod.b": [1.0]})
    described = pretrained.read(path)
    assert set(described.shapes) == {"a.weight", "b"}
    assert described.notes == ("'module._orig_mod.' was taken off its names",)
    np.savez(path, **{"module.a": [1.0], "b": [1.0]})
    assert set(pretrained.read(path).shapes) == {"module.a", "b"}, "not shared by all"


def beside(tmp_path, **files):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, path)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_config_of_timm(tmp_path):
    inner = {
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 1], "input_size": [3, 224, 224], "test_input_size": [3, 288, 288],
        "crop_pct": 0.875, "test_crop_pct": 1.0, "interpolation": "bicubic", "num_classes": 2,
        "label_names": ["n01", "n02"], "label_descriptions": {"n01": "tench", "n02": "goldfish"},
    }  # fmt: skip
    expected = {
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 1.0), "image_size": (288, 288), "crop_pct": 1.0,
        "interpolation": "bicubic", "num_classes": 2, "labels": ("tench", "goldfish"), "model": None,
    }  # fmt: skip
    assert (
        pretrained.describe(beside(tmp_path, config={"architecture": "resnet50", "pretrained_cfg": inner})) == expected
    )
    assert pretrained.describe(beside(tmp_path, config={"architecture": "resnet50", **inner})) == expected


def test_config_of_hugging_face(tmp_path):
    config = {"model_type": "resnet", "id2label": {"1": "goldfish", "0": "tench"}}
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}  # fmt: skip
    told = pretrained.describe(beside(tmp_path, config=config, preprocessor_config=preprocessor))
    assert told["labels"] == ("tench", "goldfish") and told["num_classes"] == 2
    assert told["image_size"] == (224, 224) and told["interpolation"] == "bicubic" and told["mean"] == (0.5,) * 3


def test_a_timm_config_of_hugging_face(tmp_path):
    inner = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 64, 64]}
    config = {
        "model_type": "timm_wrapper",
        "architecture": "resnet50",
        "label_names": ["a", "b"],
        "pretrained_cfg": inner,
    }
    told = pretrained.describe(beside(tmp_path, config=config))
    assert told["mean"] == (0.5,) * 3 and told["image_size"] == (64, 64) and told["labels"] == ("a", "b")


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 255}, (0.5,) * 3, (0.25,) * 3),
        ({"image_mean": [102.0] * 3, "image_std": [51] * 3, "do_rescale": False}, (0.4,) * 3, (0.2,) * 3),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 2 / 255}, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_what_a_preprocessor_does_to_bytes(tmp_path, preprocessor, mean, std):
    config = {"model_type": "resnet", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    told = pretrained.describe(beside(tmp_path, config=config, preprocessor_config=preprocessor))
    np.testing.assert_allclose([told["mean"], told["std"]], [mean, std])
    assert "labels" not in told and told["num_classes"] == 2, "names that are none"


def test_other_config_files(tmp_path):
    assert pretrained.describe(beside(tmp_path, config={"config": {"seed": 0}})) == {
        "mean": None,
        "std": None,
        "model": None,
    }
    for config, text in (
        ({"architecture": "a", "std": [0.5, 0, 0.5]}, "std is (0.5, 0.0, 0.5); expected finite numbers above 0"),
        ('{"architecture": "a", "mean": [Infinity]}', "mean is (None,); expected finite numbers"),
        ({"architecture": "a", "mean": [123, 117, 104]}, "of pixels from 0 to 255; give mean / 255"),
        (
            {"architecture": "a", "mean": [0.5], "std": [1, 1]},
            "mean has 1 numbers and std 2; both have one per channel",
        ),
        ({"architecture": "a", "input_size": [32, 32, 3]}, "image_size is (32, 32, 3), which it cannot be"),
        ({"architecture": "a", "crop_pct": 3}, "crop_pct is 3, which it cannot be"),
        ({"model_type": "a", "id2label": {"7": "cat"}}, "labels is (None,), which it cannot be"),
        ({"architecture": "a", "label_names": 3}, "label_names is 3, not a list or null"),
        ({"architecture": "a", "pretrained_cfg": {"label_names": [["n"]]}}, "label_names[0] is ['n'], not a text"),
        ({"model_type": "a", "id2label": 7}, "id2label is 7, not an object or a list or null"),
        ("{", "is not the JSON object of a model: "),
    ):
        path = beside(tmp_path, config=config)
        with pytest.raises(UserError) as caught:
            pretrained.describe(path)
        assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0.5,0.5,inf", "0,0,0", "-1,1,1", "nan,1,1"])
def test_std_in_the_metadata_that_cannot_be(tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, path, {"std": text})
    assert "std is" in error(path, pretrained.describe)
