"""`trust(explain)`: six checks of whether an explanation's maps show what the network looks at, with a verdict in a
sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topgap_jax.build import check_number, table
from topgap_jax.evaluators.sanity import cascade, leak_behind_wall, other_maps, reduced, tile
from topgap_jax.explain import edges, salience
from topgap_jax.grids import resized, shrunk
from topgap_jax.keys import fold_in
from topgap_jax.metrics import deletion, pointing, single_deletion
from topgap_jax.metrics.ranks import is_constant, spearman
from topgap_jax.metrics.summaries import average, average_curve, mean_interval
from topgap_jax.models import bind
from topgap_jax.order import average_ranks
from topgap_jax.rewrite.speed import map_over
from topgap_jax.types import Array, Check, Cost, Curve, Evaluator, Explain, Gallery, Measure

CHECKS = {
    "T1": "parameters drawn anew",
    "T2": "another class",
    "T3": "edges and salience as rivals",
    "T4": "a see-through wall",
    "T5": "three substrates",
    "T6": "the image mirrored",
}
FAILED = {
    "T1": "the maps stay when layers are random, so they do not show what the network has learnt",
    "T2": "the maps do not tell which class they are for",
    "T3": "the image alone, without the network, gives maps as good",
    "T4": "the maps mark what the network cannot see",
    "T5": "what replaces the pixels decides which map is better",
    "T6": "the maps do not follow the image",
}
PASS, WARN, FAIL, SKIPPED = "pass", "warn", "fail", "skipped"
SIDE = 64  # positions of a side at most at which maps are compared
SHIFTS = 8  # other images that each map is compared with
QUANTILE = 0.95
LEAK = 1e-6
SUBSTRATES: dict[str, Any] = {"mean": "mean", "blur": "blur", "black": 0.0}
ARMS = ("map", "edges", "salience")
RIVALS = {"deletion": ("deletion", -1), "single_deletion": ("single deletion", 1), "pointing": ("the pointing game", 1)}
SHOWN = 4  # images in the report
MAPS = ("map", "parameters anew", "another class", "behind the wall")
MEANS = {
    "upper_spearman": Measure(better="lower", label="Spearman of |map| with the upper layers drawn anew"),
    "random_spearman": Measure(better="lower", label="Spearman of |map| with all parameters drawn anew"),
    "class_spearman": Measure(better="lower", label="Spearman of the maps of the two likeliest classes"),
    "mirrored_spearman": Measure(label="Spearman of |map| and that of the mirrored image, mirrored back", main=False),
    "unmoved_spearman": Measure(label="Spearman of |map| and that of the mirrored image", main=False),
    "noise_spearman": Measure(label="Spearman of the maps of one class under noise .02", main=False),
    "edges_spearman": Measure(label="Spearman of |map| and an edge filter"),
    "salience_spearman": Measure(label="Spearman of |map| and the image's salience", main=False),
    "leak": Measure(better="lower", label="share of |map| behind the wall"),
    "hidden": Measure(label="share of the area behind the wall", main=False),
}


def trust(explain: Explain, *, stages: int = 8, steps: int = 16) -> Evaluator:
    """Six checks of whether the maps of the label are to be believed: "passes 5 of 6 checks; fails ...".

    T1: with parameters drawn anew, layer by layer from the head down to the image in `stages` parts, the map must
    become another one (Adebayo et al. 2018, arXiv 1810.03292). Spearman's correlation of |map| with itself may be no
    larger than the 95 % quantile of that with maps of other images, at the last stage and in the mean of the first
    half: guided backprop passes through upper layers as if they were not there (Sixt et al. 2020, arXiv 1912.09818),
    and loses its map only with the lower ones. T2: maps of the two likeliest classes must be less alike than two of one
    class under noise of sigma .02 (after arXiv 2506.07327). T3: the map must beat the better of `edges` and `salience`
    (arXiv 2602.09238), paired over images, at deletion of `steps` steps, at single deletion, or where the data have
    objects at the pointing game, and lose at none. T4: where a wall hides the features or pixels from the network the
    map must be dark, 1e-6 of it at most (arXiv 2404.01964, `sanity.leak_behind_wall`). T5: the map must stand at the
    same place among map, edges and salience whether deletion writes the mean colour, a blur or black. T6: the map of
    the mirrored image must be the mirrored map rather than the map; deconvnet's on a network without max pooling is the
    same for every image.

    Maps are compared as they are, of more than 64x64 positions by the means of 64x64 areas: enlarged ones are alike
    anyway. A constant map has correlation 0. All but T1 and T4 warn where images do not decide. A check that passes
    does not say that a map is right.
    """
    Explain.single("trust", explain)
    check_number("stages", stages, 1, whole=True)
    check_number("steps", steps, 1, whole=True)
    metrics = (single_deletion(), *(deletion(steps=steps, substrate=substrate) for substrate in SUBSTRATES.values()))

    def rows(keys, model, variables, batch, prepared):
        predict, images, labels = bind(model, variables), batch["image"], batch["label"]
        clean, mirrored, first, second, noisy = other_maps(explain, keys, fold_in(keys, 1), predict, images, labels)
        leak, hidden, behind = leak_behind_wall(explain, keys, predict, images, labels)
        grid = tuple(min(side, SIDE) for side in clean.shape[1:])
        small = lambda maps: shrunk(jnp.abs(maps), grid)

        def of_random(maps):
            out = {"random": alike(small(clean), small(maps), clean, maps), "dead": is_constant(maps)}
            signed = {"random_signed": alike(shrunk(clean, grid), shrunk(maps, grid), clean, maps)}
            return out | (signed if explain.signed else {}), tile(small(maps))

        random, tiles = cascade(explain, keys, model, variables, images, labels, stages, of_random)
        arms = {"map": clean} | {
            name: shrunk(rival.maps(keys, predict, images, labels), clean.shape[1:])
            for name, rival in (("edges", edges()), ("salience", salience()))
        }
        size, of_mirrored = jnp.abs(clean), jnp.abs(mirrored)
        pairs = [(first, second), (first, noisy), (size, of_mirrored), (size, of_mirrored[:, :, ::-1])]
        pairs += [(size, arms[name]) for name in ARMS[1:]]
        a, b = (jnp.stack(side) for side in zip(*pairs))
        names = ("class", "noise", "unmoved", "mirrored", "edges", "salience")
        values = jax.vmap(lambda a, b: alike(shrunk(a, grid), shrunk(b, grid), a, b))(a, b)
        out = {f"{name}_spearman": value for name, value in zip(names, values)}
        blank = is_constant(first)  # of a map that shows nothing for the first class there is nothing to compare
        out |= {f"{name}_spearman": jnp.where(blank, jnp.nan, out[f"{name}_spearman"]) for name in names[:2]}
        out |= {name: row.T for name, row in random.items()}
        out["upper_spearman"] = out["random"][:, : -(-stages // 2)].mean(1)
        out["random_spearman"], out["dead"] = out["random"][:, -1], out["dead"][:, -1]
        ranks = jax.vmap(average_ranks)(small(clean).reshape(len(clean), -1))
        whole = jnp.round(2 * ranks).astype(jnp.uint16)  # average ranks are halves
        out |= {"ranks": jnp.where(is_constant(clean)[:, None], 0, whole), "leak": leak, "hidden": hidden}
        out |= rivalry(keys, predict, arms, batch, metrics)
        finite = jnp.isfinite(clean).all((1, 2))
        out = {
            name: jnp.where(finite.reshape(-1, *(1,) * (row.ndim - 1)), row, jnp.nan if row.dtype == jnp.float32 else 0)
            for name, row in out.items()
        }
        return out | {
            "picture": jnp.round(255 * reduced(images, SIDE)).astype(jnp.uint8),
            "maps": jnp.stack([tile(small(clean)), tiles[-1], tile(small(second)), tile(small(behind))], 1),
        }

    def summary(rows):
        measures = {name: average(rows[name], about, "no map is finite") for name, about in MEANS.items()}
        checks = conclusions(rows)
        made = [check for check in checks.values() if check.status != SKIPPED]
        about = Measure(n=len(rows["leak"]), better="higher", label="checks of trust passed", unit=f"of {len(made)}")
        passed = sum(check.status == PASS for check in made)
        none = about._replace(n=0, unit="", reason="no map is finite")
        curves = {"random": "|map|", "random_signed": "the signed map"}
        share = [(stage + 1) / stages for stage in range(stages)]
        return (
            {"checks_passed": about._replace(value=passed) if made else none}
            | measures
            | {
                f"{name}_curve": average_curve(
                    rows[name],
                    Curve(share, axes=("share of layers drawn anew", "Spearman"), label=f"Spearman of {words}"),
                )
                for name, words in curves.items()
                if name in rows
            }
            | {"pictures": _pictures(rows)}
            | checks
        )

    def cost(predict, images):
        curves = sum((metric.cost(predict, images) for metric in metrics), start=Cost())
        return (stages + 6) * explain.cost(predict, images) + Cost(1, 0) + len(ARMS) * curves

    return Evaluator(rows, summary, cost)


def rivalry(keys, predict, arms: Mapping[str, Array], batch, metrics) -> dict[str, Array]:
    """{measure: (b, arms)}: deletion with each substrate, single deletion, and where there are objects pointing."""
    images = batch["image"]
    stacked = jnp.stack([resized(maps, images.shape[1:3]) for maps in arms.values()])
    found = {"region", "box"} & set(batch)

    def one(maps):
        single, *deletions = (metric(keys, predict, maps, batch) for metric in metrics)
        out = {"single_deletion": single["single_deletion"]}
        out |= {f"deletion_{name}": each["deletion"] for name, each in zip(SUBSTRATES, deletions)}
        return out | ({"pointing": pointing()(keys, predict, maps, batch)["pointing"]} if found else {})

    return {name: values.T for name, values in map_over(one, (stacked,)).items()}


def alike(a: Array, b: Array, *whole: Array) -> Array:
    """Spearman's correlation (b,) of maps a and b; 0 where one of those of which they are averages is constant."""
    constant = is_constant(whole[0]) | is_constant(whole[1])
    return jnp.where(constant, 0, spearman(a, b))


def conclusions(rows: Mapping[str, np.ndarray]) -> dict[str, Check]:
    """{"T1": Check, ...} of the rows of a split."""
    checks = (_parameters(rows), _classes(rows), _rivals(rows), _wall(rows), _substrates(rows), _image(rows))
    return {check.id: check for check in checks}


def verdict(checks: Sequence[Check]) -> str:
    """The checks in a sentence: "passes 4 of 5 checks; fails a wall ...: the maps mark what the network cannot see"."""
    made = [check for check in checks if check.status != SKIPPED]
    passed = sum(check.status == PASS for check in made)
    failed = [f"fails '{CHECKS[check.id]}': {FAILED[check.id]}" for check in made if check.status == FAIL]
    unsure = [f"'{CHECKS[check.id]}'" for check in made if check.status == WARN]
    words = [f"passes {passed} of {len(made)} checks", *failed]
    return "; ".join([*words, f"undecided: {', '.join(unsure)}"] if unsure else words)


def other_images(ranks: np.ndarray) -> np.ndarray:
    """Spearman's correlations of each map with those of the next images, of ranks (n, positions); NaN of a constant
    map."""
    values = ranks.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    values = np.divide(values, length, out=np.full_like(values, np.nan), where=length > 0)
    shifts = range(1, min(SHIFTS, len(values) - 1) + 1)
    return np.concatenate([np.zeros(0), *((values * np.roll(values, -shift, 0)).sum(1) for shift in shifts)])


def _parameters(rows) -> Check:
    others = _defined(other_images(rows["ranks"]))
    upper, every = (_defined(rows[f"{name}_spearman"]) for name in ("upper", "random"))
    if not len(every) or not len(others):
        return _skipped("T1", "fewer than two maps are finite and not constant")
    means, bound = (float(upper.mean()), float(every.mean())), float(np.quantile(others, QUANTILE))
    other = float(others.mean())
    evidence = (
        f"|map| has Spearman {means[0]:.2f} with itself while the upper half of the layers is drawn anew,"
        f" {means[1]:.2f} with all parameters; maps of other images have {other:.2f}, {QUANTILE:.0%} of them at most"
        f" {bound:.2f}"
    )
    dead = int(rows["dead"].sum())
    evidence += f"; {dead} maps are constant with all drawn anew, and count as 0" if dead else ""
    return _check("T1", max(means) <= bound, max(means), bound, len(every), evidence)


def _classes(rows) -> Check:
    evidence = "maps of the two likeliest classes have Spearman {:.2f}, of one class under noise {:.2f}"
    return _less_alike("T2", rows["class_spearman"], rows["noise_spearman"], evidence)


def _image(rows) -> Check:
    evidence = "|map| has Spearman {:.2f} with that of the mirrored image, and {:.2f} when that is mirrored back"
    return _less_alike("T6", rows["unmoved_spearman"], rows["mirrored_spearman"], evidence)


def _less_alike(check, different, same, evidence: str) -> Check:
    """Whether the correlations `different` (n,) are below those of `same` (n,) in the mean, by its 95 % interval; where
    that has both sides, the images do not decide."""
    pairs = np.stack([different, same], 1)
    pairs = pairs[np.isfinite(pairs).all(1)]
    if not len(pairs):
        return _skipped(check, "no map is finite and not constant")
    lower, higher = map(float, pairs.mean(0, dtype=np.float64))
    _, low, high = mean_interval(pairs[:, 1].astype(np.float64) - pairs[:, 0])
    evidence = evidence.format(lower, higher)
    made = _check(check, low > 0, lower, higher, len(pairs), evidence)
    return made._replace(status=WARN, sentence=evidence) if low <= 0 < high else made


def _rivals(rows) -> Check:
    wins, losses, words, n = [], [], [], 0
    for name, (label, sign) in RIVALS.items():
        values = rows.get("deletion_mean" if name == "deletion" else name)
        values = None if values is None else values[np.isfinite(values).all(1)]
        if values is None or not len(values):
            continue
        n = max(n, len(values))
        means = values.mean(0, dtype=np.float64)
        best = 1 + int(np.argmax(sign * means[1:]))
        _, low, high = mean_interval(sign * (values[:, 0] - values[:, best]))
        wins += [label] * (low > 0)
        losses += [label] * (high <= 0)  # as good as a rival is not better
        words.append(f"{label} {means[0]:.3f}, {ARMS[best]} {means[best]:.3f}")
    if not words:
        return _skipped("T3", "no map is finite")
    evidence = (
        f"{'; '.join(words)}: better, paired, at {', '.join(wins) or 'none'}, worse at {', '.join(losses) or 'none'}"
    )
    check = _check("T3", bool(wins) and not losses, len(wins), 1, n, evidence)
    return check._replace(status=WARN, sentence=evidence) if bool(wins) == bool(losses) else check


def _wall(rows) -> Check:
    leak = _defined(rows["leak"])
    if not len(leak):
        return _skipped("T4", "every map behind the wall is 0 or not finite")
    dark = int((leak <= LEAK).sum())
    evidence = (
        f"of |map| {leak.mean():.3g} lies behind a wall of {float(np.nanmean(rows['hidden'])):.0%} of the area,"
        f" {float(leak.max()):.3g} at most; {dark} of {len(leak)} maps are dark there"
    )
    return _check("T4", dark == len(leak), float(leak.max()), LEAK, len(leak), evidence)


def _substrates(rows) -> Check:
    values = np.stack([rows[f"deletion_{name}"] for name in SUBSTRATES], 1)  # (n, substrates, arms)
    values = values[np.isfinite(values).all((1, 2))]
    if not len(values):
        return _skipped("T5", "no map is finite")
    means = values.mean(0, dtype=np.float64)
    places = 1 + (means < means[:, :1]).sum(1)
    sides = []  # of each substrate and rival: 1 where the map is better, -1 where worse, 0 where images do not decide
    for substrate in range(len(SUBSTRATES)):
        bounds = [mean_interval(values[:, substrate, arm] - values[:, substrate, 0])[1:] for arm in (1, 2)]
        sides.append([int(low > 0) - int(high < 0) for low, high in bounds])
    contrary = any({1, -1} <= set(side) for side in zip(*sides))
    evidence = ", ".join(f"{name}: place {place} of {len(ARMS)}" for name, place in zip(SUBSTRATES, places))
    evidence = f"by deletion the map has, with {evidence}"
    spread = int(places.max() - places.min())
    check = _check("T5", not spread, spread, 0, len(values), evidence)
    return check._replace(status=WARN, sentence=evidence) if spread and not contrary else check


def _check(check: str, passed: bool, statistic: float, threshold: float, n: int, evidence: str) -> Check:
    words = evidence if passed else f"{evidence}: {FAILED[check]}"
    return Check(check, PASS if passed else FAIL, statistic, threshold, n, words)


def _skipped(check: str, why: str) -> Check:
    return Check(check, SKIPPED, None, None, 0, why)


def _defined(values):
    return values[np.isfinite(values)]


def _pictures(rows) -> Gallery:
    tiles, captions = [], []
    for image, maps in list(zip(rows["picture"], rows["maps"]))[:SHOWN]:
        tiles += [image if image.shape[-1] == 3 else image.mean(-1).astype(np.uint8), *maps]
        captions += ["image", *MAPS]
    return Gallery(tiles, captions, 1 + len(MAPS), "the map, and what becomes of it in the checks of trust")


TABLE = table(trust)
