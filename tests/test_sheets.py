"""Contact sheets and pictures of receptive fields: what is drawn, pixel by pixel where it matters."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from topgap_jax.errors import UserError
from topgap_jax.report import letters
from topgap_jax.report.letters import length, wrapped, write
from topgap_jax.report.overlays import (
    LARGEST,
    OUTLINE,
    TRUE_BOX,
    cell_size,
    colour_bar,
    enlarge,
    limits,
    marked,
    overlay,
    rim,
)
from topgap_jax.report.sheets import MARGIN, RIGHT, WRONG, caption, draw, field_figure, field_picture, sheet


def colour(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def pixels(picture):
    return {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()}


def images(n, h=32, w=32):
    return np.random.default_rng(0).random((n, h, w, 3)).astype(np.float32)


def maps(n, h=8, w=8):
    return np.random.default_rng(1).normal(size=(n, h, w)).astype(np.float32)


def test_a_sheet_has_a_row_per_image_and_a_column_per_method(tmp_path):
    names = [("cat", "cat"), ("cat", "dog")]
    one = sheet(tmp_path / "new" / "a.png", images(2), names=names, maps={"cam()": maps(2)})
    two = sheet(
        tmp_path / "b.png",
        images(1),
        names=names[:1],
        maps={"cam()": maps(1), "grad_cam()": maps(1, 4, 4)},
        title="test",
    )
    with Image.open(one) as first, Image.open(two) as second:
        assert first.width < second.width and first.height > second.height
        assert colour(WRONG) in pixels(first.convert("RGB")) and colour(RIGHT) in pixels(first.convert("RGB"))
        height, width = cell_size(32, 32)
        shown = np.asarray(first.convert("RGB"))[MARGIN + 24 + 24 :, MARGIN : MARGIN + width][:height]
    assert np.array_equal(shown, np.asarray(enlarge(images(2)[0], (height, width))))


def test_small_images_are_enlarged_without_blur_and_large_ones_are_made_smaller():
    image = images(1)[0]
    shown = np.asarray(enlarge(image, (96, 96)))
    assert np.array_equal(shown, np.kron((image * 255).round().astype(np.uint8), np.ones((3, 3, 1), np.uint8)))
    assert np.asarray(enlarge(np.full((8, 8, 3), 0.5), (4, 4))).max() == 128


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_cells_are_whole_multiples_or_fit(height, width):
    shown = cell_size(height, width)
    if max(height, width) <= LARGEST:
        assert shown[0] % height == 0 and shown[0] // height == shown[1] // width
    assert 1 <= min(shown) and max(shown) <= LARGEST


def test_a_map_is_resized_bilinearly_and_scaled_by_its_own_range():
    values = np.array([[0.0, 1.0], [0.0, 1.0]])
    black = np.zeros((8, 8, 3), np.float32)
    shown = np.asarray(overlay(black, 5 + 3 * values, (8, 8)), np.float32) / 255
    ramp = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)  # half-pixel centres
    alpha = (0.45 + 0.35 * ramp)[:, None]
    expected = 0.15 * (1 - alpha) + matplotlib.colormaps["inferno"](ramp)[:, :3] * alpha
    assert np.abs(shown - expected[None]).max() < 0.01
    assert np.array_equal(overlay(black, values, (8, 8)), overlay(black, 5 + 3 * values, (8, 8)))


def test_a_constant_map_is_shown_and_one_that_is_not_finite_says_so():
    image = images(1)[0]
    assert np.isfinite(np.asarray(overlay(image, np.ones((4, 4)), (64, 64)))).all()
    broken = overlay(image, np.full((4, 4), np.nan), (192, 192))
    assert not np.array_equal(broken, overlay(image, np.zeros((4, 4)), (192, 192)))
    assert colour("#c9ced6") in pixels(broken) and colour("#1a1d21") in pixels(broken)
    assert colour("#c9ced6") in pixels(field_picture(np.full((4, 4), np.inf), (192, 192)))


def test_boxes_stand_where_they_say():
    shown = np.asarray(marked(Image.new("RGB", (100, 100)), box=np.array([0.2, 0.3, 0.6, 0.9])))
    rows, columns = np.nonzero((shown == colour(TRUE_BOX)).all(-1))
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (20, 30, 59, 89)
    dashed = np.asarray(marked(Image.new("RGB", (100, 100)), map_box=np.array([0.2, 0.3, 0.6, 0.9])))
    rows, columns = np.nonzero((dashed == 255).all(-1))
    assert (rows.min(), columns.min()) == (20, 30) and rows.max() <= 59 and columns.max() <= 89


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
@settings(max_examples=50)
def test_any_box_can_be_drawn(box):
    picture = Image.new("RGB", (40, 30))
    shown = marked(picture.copy(), box=np.array(box), map_box=np.array(box))
    assert shown.size == picture.size
    if box[2] <= box[0] or box[3] <= box[1]:
        assert np.array_equal(shown, picture)


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [0.5, 0.5, 0.4, 0.9], [np.nan] * 4])
def test_a_box_without_area_is_not_drawn(box):
    assert np.array_equal(marked(Image.new("RGB", (50, 50)), box=np.array(box)), Image.new("RGB", (50, 50)))


def test_the_outline_of_a_region_lies_inside_it():
    region = np.zeros((10, 10), bool)
    region[3:7, 2:8] = True
    shown = np.asarray(marked(Image.new("RGB", (100, 100)), region=region))
    outline = (shown == colour(OUTLINE)).all(-1)
    rows, columns = np.nonzero(outline)
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (30, 20, 69, 79)
    assert outline[31, 50] and not outline[35, 50]
    assert np.array_equal(rim(np.ones((3, 3), bool), 1), ~np.pad(np.ones((1, 1), bool), 1))


def test_unsure_pixels_are_outside(tmp_path):
    unsure = np.full((1, 32, 32), 2, np.uint8)
    options = {"names": [("", "cat")], "maps": {}}
    with_region = Image.open(sheet(tmp_path / "a.png", images(1), regions=unsure, **options)).convert("RGB")
    inside = Image.open(sheet(tmp_path / "b.png", images(1), regions=unsure - 1, **options)).convert("RGB")
    count = lambda picture: int((np.asarray(picture) == colour(OUTLINE)).all(-1).sum())
    assert count(inside) > 500 > count(with_region) > 0  # the legend's square remains


def test_names_are_cut_to_the_width_and_an_unknown_truth_is_neither_right_nor_wrong():
    canvas = Image.new("RGB", (120, 24), "white")
    assert write(ImageDraw.Draw(canvas), (0, 0), "a very long class name " * 20, 120) <= 120
    caption(ImageDraw.Draw(canvas), (0, 0), "", "cat", 120)
    assert not {colour(RIGHT), colour(WRONG)} & pixels(canvas)
    assert write(ImageDraw.Draw(canvas), (0, 0), "two\nlines", 200) > 0
    caption(ImageDraw.Draw(canvas), (0, 0), "x" * 300, "y" * 300, 20)


def test_shapes_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(AssertionError):
        sheet(tmp_path / "a.png", images(2), names=[("a", "b")], maps={})
    with pytest.raises(AssertionError):
        sheet(tmp_path / "a.png", images(2), names=[("a", "b")] * 2, maps={"cam()": maps(3)})


def test_fields_are_shown_by_their_square_root(tmp_path):
    values = np.array([[0.0, 0.25], [1.0, 4.0]])
    shown = np.asarray(field_picture(values, (2, 2)), np.float32) / 255
    assert np.abs(shown - matplotlib.colormaps["inferno"](np.sqrt(values / 4))[..., :3]).max() < 0.01
    assert np.asarray(field_picture(np.zeros((2, 2)), (2, 2))).max() <= 4
    fields = {name: np.abs(maps(1, 32, 32)[0]) for name in ("centre", "corner", "a", "b", "c")}
    with Image.open(field_figure(tmp_path / "field.png", fields, title="Fields")) as picture:
        assert picture.width == 4 * 192 + 3 * 6 + 2 * MARGIN


def test_zero_maps_say_so_and_signed_ones_are_red_above_and_blue_below():
    image = np.full((32, 32, 3), 0.5, np.float32)
    zero = overlay(image, np.zeros((4, 4)), (192, 192))
    assert colour("#c9ced6") in pixels(zero) and colour("#1a1d21") in pixels(zero)
    values = np.array([[-1.0, 0.0, 2.0]])
    assert limits(values, True) == pytest.approx((-1.98, 1.98)) and limits(values, False) == pytest.approx((-1, 1.96))
    sparse = np.zeros((40, 40))
    sparse[3, 4] = 7
    assert limits(sparse, False) == (0, 7) and limits(-sparse, True) == (-7, 7)
    shown = np.asarray(overlay(image, np.repeat(values, 3, 0), (32, 96), signed=True), int)[16]
    assert shown[10, 2] > shown[10, 0] and shown[90, 0] > shown[90, 2] + 50
    assert np.ptp(shown[48]) < 8, "0 has no colour"
    canvas = Image.new("RGB", (200, 20), "white")
    colour_bar(ImageDraw.Draw(canvas), (0, 0), 200, values, True)
    row = np.asarray(canvas, int)[7]
    coloured = np.flatnonzero(np.ptp(row, 1) > 100)
    assert row[coloured[0], 2] > row[coloured[0], 0] and row[coloured[-1], 0] > row[coloured[-1], 2]


def test_long_names_of_methods_stand_in_lines_and_any_letter_is_written():
    text = "integrated(steps=64, rules=guided, baseline='blur')"
    lines = wrapped(text, 150, 13)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") and len(lines) > 1
    assert all(length(line, 13) <= 150 for line in lines) and wrapped("", 10, 13) == [""]
    assert wrapped("x" * 40, 60, 13)[0] == "x" * len(wrapped("x" * 40, 60, 13)[0])
    canvas = Image.new("RGB", (400, 24), "white")
    used = write(ImageDraw.Draw(canvas), (0, 0), "猫 кот γάτα", 400)
    assert used > 60 and (np.asarray(canvas)[:, :20] < 128).any()


def test_a_letter_that_no_font_has_is_its_number():
    """And not the frame that matplotlib's last resort has for all of its script: names of classes are to be told apart."""
    letters._font_of.cache_clear()
    ((shown, _),) = letters._runs("\U0010fffd", 14, False)
    assert shown == "U+10FFFD"
    assert "LastResort" not in str(letters._font_of("猫", False))


def test_a_place_where_nothing_can_be_written_ends_the_work_before_it_begins(tmp_path):
    def pages():
        raise AssertionError("a page was computed")
        yield

    (tmp_path / "file").write_text("")
    explained = SimpleNamespace(title="test", count=1, rows=12)
    for out, overlays, text in (
        (tmp_path / "file", None, "File exists"),
        (tmp_path / "file" / "below", None, "Not a directory"),
        (tmp_path / "sheets", tmp_path / "file", "File exists"),
        (tmp_path / "sheet.pdf", None, "sheets are PNG files; name a folder, or .*sheet.png"),
    ):
        with pytest.raises(UserError, match=text):
            next(draw(out, explained, pages(), overlays))
