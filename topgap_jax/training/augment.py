"""Augmentation on the device: a random change of a batch, `(keys (b,), batch, predict) -> batch`, inside the jitted
step.

Every example draws from its own key, so it does not depend on its neighbours (mixup and cutmix draw a partner among the
unmasked rows). Padding (`mask` False) stays as it is. Images stay in [0, 1]. What moves pixels drops `box` and `region`
from the batch, which would no longer fit.
"""

import jax
import jax.numpy as jnp
from jax import lax

from topgap_jax.baselines import Baseline, baseline_images, check_baseline
from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.grids import cell_numbers
from topgap_jax.keys import split
from topgap_jax.types import Array, Augment, Batch, Keys


def flip() -> Augment:
    """Left and right exchanged with probability 1/2."""

    def augment(keys, batch, predict):
        flipped = jax.vmap(jax.random.bernoulli)(keys)
        return _moved(batch, _flip_where(flipped, batch["image"]))

    return augment


def crop_flip(padding: int = 4) -> Augment:
    """A random window of the image padded with `padding` black pixels on every side, flipped with probability 1/2 (He
    et al. 2016, arXiv 1512.03385, section 4.2)."""
    check_number("padding", padding, 0, whole=True)

    def augment(keys, batch, predict):
        crop_keys, flip_keys = split(keys, 2)
        offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(crop_keys)
        _, *shape = batch["image"].shape
        padded = jnp.pad(batch["image"], ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        window = lambda image, offset: lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)
        image = jax.vmap(window)(padded, offsets)
        return _moved(batch, _flip_where(jax.vmap(jax.random.bernoulli)(flip_keys), image))

    return augment


def random_resized_crop(
    scale: tuple[float, float] = (0.25, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Augment:
    """A random part of the image, of area in `scale` and of log-uniform aspect `ratio`, stretched to the full size
    (bilinear, antialiased; Szegedy et al. 2015, arXiv 1409.4842). A side that would be longer than the image's is the
    image's."""
    _check_range("scale", scale, 1e-3, 1)
    _check_range("ratio", ratio, 1e-3, 1e3)

    def augment(keys, batch, predict):
        _, h, w, c = batch["image"].shape

        def crop(key, image):
            u = jax.random.uniform(key, (4,))
            area = scale[0] + (scale[1] - scale[0]) * u[0]
            aspect = jnp.exp(jnp.log(ratio[0]) + (jnp.log(ratio[1]) - jnp.log(ratio[0])) * u[1])
            sides = jnp.minimum(jnp.sqrt(area * jnp.stack([1 / aspect, aspect])), 1.0)
            start = u[2:] * (1 - sides) * jnp.array([h, w])
            return jax.image.scale_and_translate(image, (h, w, c), (0, 1), 1 / sides, -start / sides, "linear")

        return _moved(batch, jnp.clip(jax.vmap(crop)(keys, batch["image"]), 0, 1))

    return augment


def cutout(size: int, value: float = 0.5) -> Augment:
    """A square of `size` pixels a side set to `value`, its centre anywhere, cut at the border (DeVries & Taylor 2017,
    arXiv 1708.04552). The paper fills with the data's mean; mid-grey stands for it, since images are normalised in the
    model."""
    check_number("size", size, 1, whole=True)
    check_number("value", value, 0, 1)

    def augment(keys, batch, predict):
        _, h, w, _ = batch["image"].shape
        sides = jnp.full((len(keys), 2), size)
        hole = _boxes(keys, sides, h, w)[..., None]
        return {**batch, "image": jnp.where(_unmasked(batch) & hole, value, batch["image"])}

    return augment


def colour_jitter(brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4) -> Augment:
    """Brightness, contrast and saturation, in this order, each by a factor uniform in [1 - x, 1 + x].

    x -> factor x; mean + factor (x - mean), the mean of the image's grey; grey + factor (x - grey). Clipped to [0, 1]
    after each.
    """
    for name, amount in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        check_number(name, amount, 0, 1)
    amounts = jnp.array([brightness, contrast, saturation])

    def augment(keys, batch, predict):
        draw = lambda key: 1 + amounts * jax.random.uniform(key, (3,), minval=-1, maxval=1)
        factors = jax.vmap(draw)(keys)[:, :, None, None, None]
        image = jnp.clip(factors[:, 0] * batch["image"], 0, 1)
        mean = _grey(image).mean((1, 2), keepdims=True)
        image = jnp.clip(mean + factors[:, 1] * (image - mean), 0, 1)
        grey = _grey(image)
        image = jnp.clip(grey + factors[:, 2] * (image - grey), 0, 1)
        return {**batch, "image": jnp.where(_unmasked(batch), image, batch["image"])}

    return augment


def mixup(alpha: float = 0.2) -> Augment:
    """w x + (1 - w) x of a partner, targets likewise, one w ~ Beta(alpha, alpha) per example (Zhang et al. 2018, arXiv
    1710.09412). `label` stays the example's own."""
    check_number("alpha", alpha, 1e-3)

    def augment(keys, batch, predict):
        partner_keys, weight_keys = split(keys, 2)
        partner = partners(partner_keys, batch["mask"])
        weight = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(weight_keys)
        share = weight[:, None, None, None]
        image = share * batch["image"] + (1 - share) * batch["image"][partner]
        return _moved({**batch, "targets": _mixed(batch, weight, partner)}, image)

    return augment


def cutmix(alpha: float = 1.0) -> Augment:
    """A rectangle of a partner's image pasted in, area about 1 - w, w ~ Beta(alpha, alpha) (Yun et al. 2019, arXiv
    1905.04899).

    The targets are mixed by the area really pasted: the rectangle is cut at the border. `label` stays the example's
    own.
    """
    check_number("alpha", alpha, 1e-3)

    def augment(keys, batch, predict):
        _, h, w, _ = batch["image"].shape
        partner_keys, weight_keys, box_keys = split(keys, 3)
        partner = partners(partner_keys, batch["mask"])
        weight = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(weight_keys)
        sides = jnp.sqrt(1 - weight)[:, None] * jnp.array([h, w])
        pasted = _boxes(box_keys, jnp.round(sides).astype(jnp.int32), h, w)
        image = jnp.where(pasted[..., None], batch["image"][partner], batch["image"])
        return _moved({**batch, "targets": _mixed(batch, 1 - pasted.mean((1, 2)), partner)}, image)

    return augment


def delete_cell(grid: int = 4, baseline: Baseline = "mean") -> Augment:
    """With probability 1/2, one of grid x grid cells, drawn uniformly, replaced by `baseline` ("mean", "blur", "noise",
    "black", "white", a colour; `topgap_jax.baselines`).

    Training for IDSDS (Hesse et al. 2024, arXiv 2407.11910): images with a cell removed are then what the network
    knows, and `single_deletion` with the same grid and substrate may be compared between networks.
    """
    check_number("grid", grid, 2, whole=True)
    check_baseline("delete_cell: baseline", baseline)

    def augment(keys, batch, predict):
        image = batch["image"]
        chance_keys, cell_keys, baseline_keys = split(keys, 3)
        cells = cell_numbers("delete_cell", grid, image.shape[1:3])
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, grid**2))(cell_keys)
        removed = jax.vmap(jax.random.bernoulli)(chance_keys)[:, None, None] & (cells == drawn[:, None, None])
        other = baseline_images("delete_cell: baseline", baseline, predict, image, baseline_keys)
        return {**batch, "image": jnp.where(_unmasked(batch) & removed[..., None], other, image)}

    return augment


def partners(keys: Keys, mask: Array) -> Array:
    """For every unmasked row another one (b,): the next in the order of per-example uniforms, the last one's is the
    first.

    A masked row, or one that is alone, is its own partner.
    """
    b = len(mask)
    order = jnp.argsort(jnp.where(mask, jax.vmap(jax.random.uniform)(keys), 2.0))  # masked rows come last
    position = jnp.arange(b)
    following = order[jnp.where(position + 1 < mask.sum(), position + 1, 0)]
    return jnp.where(mask, jnp.zeros_like(order).at[order].set(following), position)


def _unmasked(batch: Batch) -> Array:
    return batch["mask"][:, None, None, None]


def _moved(batch: Batch, image: Array) -> Batch:
    """The batch with new images where it is not padding, without what was true of the old ones only."""
    image = jnp.where(_unmasked(batch), image, batch["image"])
    return {key: value for key, value in batch.items() if key not in ("box", "region")} | {"image": image}


def _flip_where(flipped: Array, image: Array) -> Array:
    return jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)


def _boxes(keys: Keys, sides: Array, h: int, w: int) -> Array:
    """True (b, h, w) inside rectangles of `sides` (b, 2) int32 pixels centred on a random pixel, cut at the border."""

    def box(key, side):
        start = jax.random.randint(key, (2,), 0, jnp.array([h, w])) - side // 2
        inside = lambda n, i: (jnp.arange(n) >= start[i]) & (jnp.arange(n) < start[i] + side[i])
        return inside(h, 0)[:, None] & inside(w, 1)[None, :]

    return jax.vmap(box)(keys, sides)


def _mixed(batch: Batch, weight: Array, partner: Array) -> Array:
    share = jnp.where(batch["mask"], weight, 1.0)[:, None]
    return share * batch["targets"] + (1 - share) * batch["targets"][partner]


def _grey(image: Array) -> Array:
    """Luminance (ITU-R BT.601) of images with 3 channels, else the channels' mean: (b, h, w, 1)."""
    if image.shape[-1] == 3:
        return (image * jnp.array([0.299, 0.587, 0.114])).sum(-1, keepdims=True)
    return image.mean(-1, keepdims=True)


def _check_range(name: str, bounds, low: float, high: float) -> None:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not low <= bounds[0] <= bounds[1] <= high:
        raise UserError(f"{name} must be two numbers (smallest, largest) in [{low:g}, {high:g}], got {bounds}")


TABLE = table(flip, crop_flip, random_resized_crop, cutout, colour_jitter, mixup, cutmix, delete_cell)
