"""The laws of every augmentation, and what each one does to pixels and targets, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax.build import build
from topgap_jax.errors import UserError
from topgap_jax.grids import cell_numbers
from topgap_jax.training import augment
from topgap_jax.training.augment import TABLE, partners

SHOWN = {  # whose arguments have no default, or one that asks the network
    "cutout": lambda: augment.cutout(5),
    "delete_cell": lambda: augment.delete_cell(baseline="black"),
}
ROWS = {name: SHOWN.get(name, make)() for name, make in TABLE.items()}
MIXING = ("mixup", "cutmix")
B, H, W, K = 64, 12, 10, 64  # as many classes as rows, so that targets can be the identity
REAL = 56  # rows that are no padding
JITTED = {name: jax.jit(lambda keys, batch, each=each: each(keys, batch, None)) for name, each in ROWS.items()}


def make_batch(seed=0):
    random = np.random.default_rng(seed)
    label = random.integers(0, K, B)
    return {
        "image": jnp.asarray(random.random((B, H, W, 3)), jnp.float32),
        "targets": jnp.eye(K)[label],
        "label": jnp.asarray(label, jnp.int32),
        "id": jnp.arange(B, dtype=jnp.int32),
        "mask": jnp.arange(B) < REAL,
        "box": jnp.tile(jnp.array([0.0, 0.0, 0.5, 1.0]), (B, 1)),
        "group": jnp.zeros(B, jnp.int32),
    }


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), B)


def shuffled(seed=3):
    return np.random.default_rng(seed).permutation(B)


@pytest.mark.parametrize("name", ROWS)
def test_laws(name):
    batch = make_batch()
    out = JITTED[name](keys(), batch)
    # shapes, ranges, what stays
    for key in ("image", "targets", "label", "id", "mask", "group"):
        assert (out[key].shape, out[key].dtype) == (batch[key].shape, batch[key].dtype)
    for key in ("label", "id", "mask", "group"):
        np.testing.assert_array_equal(out[key], batch[key])
    assert 0 <= out["image"].min() and out["image"].max() <= 1
    np.testing.assert_allclose(out["targets"].sum(1), 1, atol=1e-6)
    assert not np.array_equal(out["image"][:REAL], batch["image"][:REAL])
    # padding is left alone
    np.testing.assert_array_equal(out["image"][REAL:], batch["image"][REAL:])
    np.testing.assert_array_equal(out["targets"][REAL:], batch["targets"][REAL:])
    # same keys, same result; other keys, another one; eager as jitted
    np.testing.assert_array_equal(out["image"], JITTED[name](keys(), batch)["image"])
    assert not np.array_equal(out["image"], JITTED[name](keys(1), batch)["image"])
    eager = ROWS[name](keys(), batch, None)
    assert set(eager) == set(out)
    for key in out:
        np.testing.assert_allclose(eager[key], out[key], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in MIXING])
def test_a_row_does_not_depend_on_its_neighbours(name):
    batch, order = make_batch(), shuffled()
    out = JITTED[name](keys(), batch)
    permuted = JITTED[name](keys()[order], {key: value[order] for key, value in batch.items()})
    np.testing.assert_allclose(permuted["image"], out["image"][order], atol=1e-6)
    other = make_batch(seed=9)
    mixed = {key: jnp.concatenate([batch[key][:1], other[key][1:]]) for key in batch}
    np.testing.assert_allclose(JITTED[name](keys(), mixed)["image"][0], out["image"][0], atol=1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_padding_is_never_a_partner(name):
    batch = make_batch()
    poisoned = {
        **batch,
        "image": batch["image"].at[REAL:].set(jnp.nan),
        "targets": batch["targets"].at[REAL:].set(jnp.nan),
    }
    out, clean = JITTED[name](keys(), poisoned), JITTED[name](keys(), batch)
    np.testing.assert_array_equal(out["image"][:REAL], clean["image"][:REAL])
    np.testing.assert_array_equal(out["targets"][:REAL], clean["targets"][:REAL])


@pytest.mark.parametrize("name", MIXING)
def test_mixing_follows_its_example_in_any_order(name):
    batch, order = make_batch(), shuffled()
    out = JITTED[name](keys(), batch)
    permuted = JITTED[name](keys()[order], {key: value[order] for key, value in batch.items()})
    np.testing.assert_allclose(permuted["image"], out["image"][order], atol=1e-6)
    np.testing.assert_allclose(permuted["targets"], out["targets"][order], atol=1e-6)


def test_partners_are_one_cycle_through_the_unmasked_rows():
    for seed in range(20):
        mask = np.random.default_rng(seed).random(B) < 0.7
        partner = np.asarray(partners(keys(seed), jnp.asarray(mask)))
        np.testing.assert_array_equal(partner[~mask], np.arange(B)[~mask])
        if mask.any():
            start = here = int(np.flatnonzero(mask)[0])
            visited = []
            for _ in range(mask.sum()):
                here = int(partner[here])
                visited.append(here)
            assert here == start and sorted(visited) == np.flatnonzero(mask).tolist()


def test_only_pixels_that_stay_in_place_keep_box_and_region():
    kept = {name for name in ROWS if "box" in jax.eval_shape(lambda b, n=name: ROWS[n](keys(), b, None), make_batch())}
    assert kept == {"cutout", "colour_jitter", "delete_cell"}


def test_flip_exchanges_left_and_right_in_half_of_the_images():
    batch = make_batch()
    out, image = np.asarray(JITTED["flip"](keys(), batch)["image"])[:REAL], np.asarray(batch["image"])[:REAL]
    flipped = (out == image[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (out == image).all((1, 2, 3))).all()
    assert 14 < flipped.sum() < 42  # of 56: within four standard deviations


def test_crop_flip_gives_windows_of_the_padded_image():
    batch = make_batch()
    out, image = np.asarray(JITTED["crop_flip"](keys(), batch)["image"]), np.asarray(batch["image"])
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = set()
    for i in range(REAL):
        windows = {}
        for y in range(9):
            for x in range(9):
                window = padded[i, y : y + H, x : x + W]
                windows[window.tobytes()], windows[window[:, ::-1].tobytes()] = (y, x, 0), (y, x, 1)
        found.add(windows[out[i].tobytes()])
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(9)) and {f for *_, f in found} == {0, 1}


def test_cutout_paints_squares_cut_at_the_border():
    batch = make_batch()
    out = np.asarray(JITTED["cutout"](keys(), batch)["image"])[:REAL]
    hole = (out != np.asarray(batch["image"])[:REAL]).all(-1)
    assert (out[hole] == 0.5).all()
    areas = hole.sum((1, 2))
    assert areas.max() == 25 and areas.min() >= 9  # a corner keeps 3 of 5 pixels a side
    for each in hole:
        rows, columns = np.flatnonzero(each.any(1)), np.flatnonzero(each.any(0))
        assert each.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_colour_jitter_against_numpy():
    batch = make_batch()
    out = JITTED["colour_jitter"](keys(), batch)["image"]
    weights = np.array([0.299, 0.587, 0.114])
    for i in range(REAL):
        brightness, contrast, saturation = 1 + 0.4 * np.asarray(
            jax.random.uniform(keys()[i], (3,), minval=-1, maxval=1)
        )
        x = np.clip(brightness * np.asarray(batch["image"][i], np.float64), 0, 1)
        mean = (x @ weights).mean()
        x = np.clip(mean + contrast * (x - mean), 0, 1)
        grey = (x @ weights)[..., None]
        np.testing.assert_allclose(out[i], np.clip(grey + saturation * (x - grey), 0, 1), atol=1e-5)


def test_colour_jitter_of_nothing_changes_nothing():
    batch = make_batch()
    out = augment.colour_jitter(0, 0, 0)(keys(), batch, None)["image"]
    np.testing.assert_allclose(out, batch["image"], atol=1e-6)


def test_mixup_mixes_pixels_and_targets_by_one_weight():
    batch = {**make_batch(), "targets": jnp.eye(B)}
    out = JITTED["mixup"](keys(), batch)
    weight = np.asarray(out["targets"])  # row i: its own weight at i, the rest at its partner
    np.testing.assert_allclose(out["image"], np.einsum("ij,jhwc->ihwc", weight, batch["image"]), atol=1e-6)
    partners_met = np.count_nonzero(weight[:REAL], axis=1) - 1  # 0 where the weight is 1 in float32
    assert partners_met.max() == 1 and partners_met.mean() > 0.9


def test_mixup_weights_follow_the_beta_distribution():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) = .179 for alpha = .2."""
    batch = {**make_batch(), "targets": jnp.eye(B)}
    weights = [np.diag(JITTED["mixup"](keys(seed), batch)["targets"])[:REAL] for seed in range(40)]
    assert abs(np.mean(weights) - 0.5) < 0.04 and abs(np.var(weights) - 0.179) < 0.02


def test_cutmix_weights_are_the_exact_area_pasted():
    batch = {**make_batch(), "targets": jnp.eye(B)}
    out = JITTED["cutmix"](keys(), batch)
    weight, image = np.asarray(out["targets"]), np.asarray(batch["image"])
    for i in range(REAL):
        pasted = (np.asarray(out["image"][i]) != image[i]).all(-1)
        np.testing.assert_allclose(weight[i, i], 1 - pasted.mean(), atol=1e-6)
        if pasted.any():
            partner = int(np.delete(weight[i], i).argmax())
            partner += partner >= i
            np.testing.assert_array_equal(np.asarray(out["image"][i])[pasted], image[partner][pasted])
    assert (np.diag(weight)[:REAL] < 1).sum() >= 50


def test_a_resized_crop_of_everything_is_the_image():
    batch = make_batch()
    out = augment.random_resized_crop(scale=(1, 1), ratio=(1, 1))(keys(), batch, None)["image"]
    np.testing.assert_allclose(out, batch["image"], atol=1e-5)


def test_a_resized_crop_of_a_ramp_is_a_part_of_the_ramp():
    """Bilinear resizing of x keeps it linear (away from the border), with slope sqrt(area ratio) when the aspect is
    fixed."""
    ramp = jnp.broadcast_to((jnp.arange(32) / 31)[None, None, :, None], (B, 32, 32, 3))
    batch = {**make_batch(), "image": ramp, "mask": jnp.ones(B, bool)}
    out = augment.random_resized_crop(scale=(0.25, 0.25), ratio=(1, 1))(keys(), batch, None)["image"]
    slopes = np.diff(np.asarray(out), axis=2)[:, :, 3:-3]
    np.testing.assert_allclose(slopes, 0.5 / 31, atol=1e-5)


@pytest.mark.parametrize(
    "text, said",
    [
        ("crop_flip(padding=-1)", r"crop_flip: padding must be a whole number of at least 0, got -1"),
        ("cutout(0)", r"cutout: size must be a whole number of at least 1, got 0"),
        ("mixup(alpha=0)", r"mixup: alpha must be a number of at least 0.001, got 0"),
        ("cutmix('x')", r"cutmix: alpha must be a number of at least 0.001, got 'x'"),
        ("colour_jitter(brightness=2)", r"colour_jitter: brightness must be a number in \[0, 1\], got 2"),
        (
            "random_resized_crop(scale=(1, .2))",
            r"scale must be two numbers \(smallest, largest\) in \[0.001, 1\], got \(1, 0.2\)",
        ),
        ("random_resized_crop(ratio=2)", r"ratio must be two numbers \(smallest, largest\) in \[0.001, 1000\], got 2"),
    ],
)
def test_wrong_arguments_are_one_line(text, said):
    with pytest.raises(UserError, match=said):
        build(text, TABLE, {}, "config.augment")


def test_delete_cell_replaces_one_cell_of_half_of_the_images():
    batch = make_batch()
    out = np.asarray(augment.delete_cell(grid=3, baseline="black")(keys(), batch, None)["image"])
    changed = (out != np.asarray(batch["image"])).any(-1)
    cells = cell_numbers("", 3, (H, W))
    removed = {tuple(np.unique(cells[each])) for each in changed[changed.any((1, 2))]}
    assert removed == {(cell,) for cell in range(9)} and (out[changed] == 0).all()
    for each in changed[changed.any((1, 2))]:
        np.testing.assert_array_equal(each, cells == cells[each][0])  # the whole cell
    assert REAL / 3 < changed.any((1, 2)).sum() < 2 * REAL / 3
    with pytest.raises(UserError, match="delete_cell: a grid of 11 x 11 cells is finer"):
        augment.delete_cell(grid=11)(keys(), batch, None)
