"""Folders of pictures: layouts, what is skipped, formats, and files that are no pictures."""

import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from topgap_jax import data
from topgap_jax.data import formats
from topgap_jax.errors import UserError


def picture(i=0, h=6, w=8):
    return np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)


def put(root, *files):
    """Pictures at these paths, other files where the name ends otherwise."""
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in formats.SUFFIXES:
            Image.fromarray(picture(i)).save(path)
        else:
            path.write_text("text")


def opened(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return formats.open_picture(path)


def error(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(root, split):
    source = data.folder(str(root))(split)
    return source.classes, sorted((source.classes[row["label"]], row["name"]) for row in source)


def test_pictures_lie_at_any_depth_below_their_class(tmp_path):
    put(
        tmp_path / "split",
        "train/cat/a.png",
        "train/cat/2019/may/b.tif",
        "train/dog/x/c.gif",
        "val/cat/d.png",
        "val/dog/e.png",
    )
    assert read(tmp_path / "split", "train") == (("cat", "dog"), [("cat", "a.png"), ("cat", "b.tif"), ("dog", "c.gif")])
    assert read(tmp_path / "split", "val")[1] == [("cat", "d.png"), ("dog", "e.png")]
    put(tmp_path / "plain", "cat/front/a.png", "cat/back/b.png", "dog/front/c.png", "dog/d.png")
    assert read(tmp_path / "plain", "all") == (
        ("cat", "dog"), [("cat", "a.png"), ("cat", "b.png"), ("dog", "c.png"), ("dog", "d.png")]
    )  # fmt: skip
    said = error(data.folder(str(tmp_path / "plain")), "cat")
    assert "'cat' is the folder of a class; it would be a split if it were called train, val or test" in said


@pytest.mark.parametrize("stray", ["x.png", "train/x.png", "val/x.png", "examples/x.png"])
def test_a_stray_picture_is_no_class(stray, tmp_path, capsys):
    put(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png", stray)
    assert read(tmp_path, "train") == (("cat", "dog"), [("cat", "a.png"), ("dog", "b.png")])
    said = f"topgap: folder('{tmp_path}'): skipped 1 picture outside a class (x.png)\n"
    assert capsys.readouterr().err == said


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path, "train/1.png", "car/2.png", "bus/3.png")
    assert read(tmp_path, "all")[0] == ("bus", "car", "train")
    put(tmp_path, "train/side/4.png", "train/side/5.png", "train/top/6.png")
    assert read(tmp_path, "all")[0] == ("bus", "car", "train")


def test_what_is_skipped_is_said_in_one_line(tmp_path, capsys):
    put(
        tmp_path, "train/cat/a.png", "train/cat/.b.png", "train/cat/Thumbs.db", "train/cat/c.heic", "train/cat/d.heic",
        "train/dog/e.png", "train/.cache/f.png", "README", "g.png", "h.png",
    )  # fmt: skip
    (tmp_path / "train" / "bird").mkdir()
    assert read(tmp_path, "train")[0] == ("cat", "dog")
    assert capsys.readouterr().err == (
        f"topgap: folder('{tmp_path}'): skipped 1 empty class (bird), 2 pictures outside a class (g.png, h.png), "
        "4 files of other kinds (.db, .heic, README), 2 hidden files\n"
    )
    put(tmp_path / "clean", "a/1.png", "b/2.png")
    data.folder(str(tmp_path / "clean"))("all")
    assert capsys.readouterr().err == ""
    put(tmp_path / "none", "a/1.heic", "b/2.heic")
    assert error(data.folder, str(tmp_path / "none")).endswith(
        "; skipped 2 empty classes (a, b), 2 files of other kinds (.heic)"
    )


def test_a_class_that_only_one_split_has(tmp_path):
    put(tmp_path, "train/cat/a.png", "val/cat/b.png", "val/bird/c.png", "test/cat/d.png")
    (tmp_path / "train" / "bird").mkdir()
    assert error(data.folder, str(tmp_path)) == (
        f"folder('{tmp_path}'): only val has pictures of class 'bird', test, train have none; every split needs every "
        "class: add pictures of it there, or move its folder away"
    )


def test_links_that_go_round_end(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    names = [row["name"] for row in data.folder(str(tmp_path))("all")]
    assert sorted(set(names)) == ["1.png", "2.png"] and len(names) < 10


def test_16_bits_are_scaled(tmp_path):
    values = np.linspace(0, 65535, 60 * 40).reshape(60, 40).astype(np.uint16)
    for suffix in ("png", "tif"):
        grey = opened(tmp_path / f"grey.{suffix}", Image.fromarray(values))
        np.testing.assert_array_equal(grey, np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, -1))
    assert abs(grey.mean() - 127.5) < 0.1


def write_tiff(path, bits, photometric, values):
    """A grey picture of one row; 12 bits are packed."""
    packed = int("".join(f"{value % 4096:012b}" for value in values), 2).to_bytes(len(values) * 3 // 2, "big")
    pixels = packed if bits == 12 else struct.pack(f"<{len(values)}H", *values)
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    path.write_bytes(head + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_black_and_white_of_a_tiff_are_what_it_says(tmp_path, bits, white_is_zero):
    largest = 2**bits - 1
    values = [0, largest // 3, largest // 2, largest]
    write_tiff(tmp_path / "a.tif", bits, 0 if white_is_zero else 1, values)
    expected = np.rint(255 * np.array(values) / largest)
    found = formats.open_picture(tmp_path / "a.tif")[0, :, 0]
    np.testing.assert_allclose(found, 255 - expected if white_is_zero else expected, atol=1)


@pytest.mark.parametrize(
    ("bits", "colour", "row", "transparent", "expected"),
    [
        (2, 0, bytes([0b00011011]), (1,), [0, 255, 170, 255]),
        (4, 0, bytes([0x07, 0x8F]), (7,), [0, 255, 136, 255]),
        (16, 2, struct.pack(">12H", *3 * [0x1234], *3 * [0], *6 * [0xFFFF]), 3 * (0x1234,), [255, 0, 255, 255]),
    ],
)
def test_a_png_may_name_a_transparent_value_in_its_own_bits(tmp_path, bits, colour, row, transparent, expected):
    chunk = lambda kind, content: (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 4, 1, bits, colour, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(transparent)}H", *transparent),
        b"IDAT": zlib.compress(b"\0" + row),
        b"IEND": b"",
    }
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items()))
    assert formats.open_picture(tmp_path / "a.png")[0, :, 0].tolist() == expected


def test_only_the_named_formats_are_opened(tmp_path, monkeypatch):
    """An EPS would start Ghostscript, were Pillow let to choose by the file's content."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    for name, kind in (("eps.png", "EPS"), ("ppm.png", "PPM"), ("tga.jpg", "TGA"), ("ico.png", "ICO")):
        Image.fromarray(picture(0, 16, 16)).save(tmp_path / name, format=kind)
        assert error(formats.open_picture, tmp_path / name) == (
            f"{tmp_path / name} is no picture of the formats that are read: {', '.join(formats.FORMATS)}"
        )
    Image.fromarray(picture()).save(tmp_path / "a.png", format="BMP")  # one of them under another's name
    np.testing.assert_array_equal(formats.open_picture(tmp_path / "a.png"), picture())


def test_transparency_is_laid_on_white(tmp_path):
    alpha = np.zeros((6, 8, 1), np.uint8)
    alpha[:, 2:4], alpha[:, 4:] = 51, 255
    expected = picture() * (alpha / 255) + 255 * (1 - alpha / 255)
    for name in ["a.png", "a.tif", *(["a.webp"] if features.check("webp") else [])]:
        found = opened(tmp_path / name, np.concatenate([picture(), alpha], -1), lossless=True)
        np.testing.assert_allclose(found, expected, atol=1)
    black = Image.new("P", (3, 2))  # a palette, colour 0 (black) transparent
    for name in ("b.gif", "b.png"):
        assert (opened(tmp_path / name, black, transparency=0) == 255).all()
    grey = opened(tmp_path / "c.png", np.array([[0, 7], [9, 255]], np.uint8), transparency=7)
    assert grey[..., 0].tolist() == [[0, 255], [9, 255]]
    deep = opened(tmp_path / "d.png", Image.fromarray(np.array([[0, 700], [65535, 257]], np.uint16)), transparency=700)
    assert deep[..., 1].tolist() == [[0, 255], [255, 1]]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "gif", "webp", "avif"])
def test_formats(suffix, tmp_path):
    if f".{suffix}" not in formats.SUFFIXES:
        pytest.skip(f"this Pillow cannot read {suffix}")
    image = np.repeat(picture()[..., :1], 3, -1)
    found = opened(tmp_path / f"a.{suffix}", image, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_allclose(found.astype(int), image, atol=40 if suffix == "avif" else 0)


def test_the_first_frame_of_an_animation_and_the_first_page(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "a.tif", "a.png"):
        found = opened(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(found, np.broadcast_to([200, 0, 0], (3, 4, 3)))


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_pictures_are_turned_as_exif_says_once(suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    found = opened(tmp_path / f"a.{suffix}", Image.fromarray(picture()), exif=exif)
    assert found.shape == (8, 6, 3)
    np.testing.assert_allclose(found.astype(int), np.rot90(picture(), -1), atol=0 if suffix != "jpg" else 255)


def test_cmyk_and_black_and_white(tmp_path):
    white = opened(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)))
    assert white.min() >= 250
    assert (opened(tmp_path / "b.png", Image.new("1", (8, 8), 1)) == 255).all()
    said = error(opened, tmp_path / "f.tif", Image.fromarray(np.ones((2, 2), np.float32)))
    assert said.endswith(
        "f.tif holds floating-point values, which have no stated white; save it with 8 or 16 bits a channel"
    )
    assert "holds 32-bit values" in error(opened, tmp_path / "i.tif", Image.fromarray(np.ones((2, 2), np.int32)))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "gif"])
def test_a_truncated_file_is_named_with_its_folder(kind, tmp_path):
    put(tmp_path, "train/cat/a.png", "train/dog/b.png")
    file = tmp_path / "train" / "dog" / f"c.{kind}"
    Image.fromarray(picture(0, 64, 64)).save(file)
    whole = file.read_bytes()
    for length in (len(whole) // 2, 20, 3):
        file.write_bytes(whole[:length])
        source = data.folder(str(tmp_path))("train")
        said = error(lambda: list(source))
        assert said.startswith(f"folder('{tmp_path}') split 'train' index "), said
        assert f": train/dog/c.{kind} " in said or f": {Path('train/dog') / file.name} " in said
    file.write_bytes(b"")
    assert error(lambda: list(data.folder(str(tmp_path))("train"))).endswith(f"train/dog/c.{kind} is empty")


def test_a_pipe_a_socket_a_device_and_a_broken_link_are_never_opened(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/2.png")
    pipe = tmp_path / "b" / "pipe.png"
    os.mkfifo(pipe)
    for function in (data.folder, data.pictures):
        assert (
            error(function, str(tmp_path if function is data.folder else pipe))
            == f"{pipe} is a pipe, no file of a picture"
        )
    pipe.unlink()
    monkeypatch.chdir(tmp_path / "b")  # the address of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.png")
        assert error(data.folder, str(tmp_path)) == f"{tmp_path}/b/s.png is a socket, no file of a picture"
    (tmp_path / "b" / "s.png").unlink()
    (tmp_path / "b" / "null.png").symlink_to("/dev/null")
    assert error(data.folder, str(tmp_path)) == f"{tmp_path}/b/null.png is a device, no file of a picture"
    (tmp_path / "b" / "null.png").unlink()
    (tmp_path / "b" / "gone.png").symlink_to("nowhere.png")
    assert error(data.folder, str(tmp_path)) == f"{tmp_path}/b/gone.png cannot be read: No such file or directory"


def test_the_number_of_pixels_is_asked_from_the_header(tmp_path):
    """Pillow's own limit would warn of half as many, and warnings are errors here."""
    side = 13_500
    assert 13_000**2 < formats.PIXELS < side**2
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    assert error(formats.open_picture, tmp_path / "a.png") == (
        f"{tmp_path}/a.png has 13500 x 13500 pixels, and the limit is 180 million; scale it"
    )


def test_a_large_picture_becomes_rgb_band_by_band(tmp_path, monkeypatch):
    """The same as at once, in every mode; a mode of several channels may have fewer pixels."""
    random = np.random.default_rng(0)
    pixels = lambda *shape, kind=np.uint8: random.integers(0, np.iinfo(kind).max, (13, 7, *shape), kind)
    pictures = [
        (Image.fromarray(pixels()), {}), (Image.fromarray(pixels()), {"transparency": 7}),
        (Image.fromarray(pixels(3)), {}), (Image.fromarray(pixels(4)), {}), (Image.fromarray(pixels(2)), {}),
        (Image.fromarray(pixels(3)).quantize(30), {"transparency": 3}), (Image.fromarray(pixels()).convert("1"), {}),
        (Image.fromarray(pixels(kind=np.uint16)), {}), (Image.fromarray(pixels(kind=np.uint16)), {"transparency": 9}),
    ]  # fmt: skip
    for image, options in pictures:
        image.save(tmp_path / "a.png", **options)
        whole = formats.open_picture(tmp_path / "a.png")
        with monkeypatch.context() as patch:
            patch.setattr(formats, "BAND", 7 * 4)
            np.testing.assert_array_equal(formats.open_picture(tmp_path / "a.png"), whole)
    monkeypatch.setattr(formats, "COLOURED", 90)
    assert error(formats.open_picture, tmp_path / "a.png").endswith(
        "a.png has 7 x 13 pixels, and the limit is 0 million; scale it"
    )


@pytest.mark.slow
def test_a_square_of_13000_pixels(tmp_path):
    Image.new("1", (13_000, 13_000), 1).save(tmp_path / "a.png")
    assert data.decode(data.pictures(str(tmp_path)), 0, (4, 4))["image"].min() == 255


def test_pictures_say_what_they_skip(tmp_path, capsys):
    put(tmp_path, "b.png", "a.tif", "deeper/c.png", "notes.txt")
    assert [row["name"] for row in data.pictures(str(tmp_path))] == ["a.tif", "b.png"]
    assert "skipped 1 folder (deeper), 1 file of another kind (.txt)" in capsys.readouterr().err
    put(tmp_path / "top", "deeper/c.png")
    assert error(data.pictures, str(tmp_path / "top")).endswith(
        f"; name one of its folders, such as {tmp_path}/top/deeper"
    )
