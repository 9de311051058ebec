"""`attack_split`: the attacks of a `Robustness` over a split, each on the examples that are still unbroken.

The queue makes the runs; a forward pass of its own on each adversarial image, made after the run, is the verdict.
Verdicts of a split depend neither on its order nor on a stop in between.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from topgap_jax.attacks import bound
from topgap_jax.balls import radius_text
from topgap_jax.edges import check_outputs
from topgap_jax.errors import UserError
from topgap_jax.keys import root
from topgap_jax.measure import adversarial, queue
from topgap_jax.measure.costs import cost_of
from topgap_jax.measure.log import Log
from topgap_jax.measure.rows import by_batches
from topgap_jax.measure.splits import Split, check_model, narrowed
from topgap_jax.measure.verdicts import seen
from topgap_jax.mesh import replicated
from topgap_jax.metrics.summaries import by_group, share
from topgap_jax.models import bind
from topgap_jax.progress import bar
from topgap_jax.scores import substitute
from topgap_jax.stored import NUMBER, mismatch
from topgap_jax.types import Attack, Cost, Curve, Measure, Model, Robustness, Variables

NONE = -1
COLUMNS = {
    "ids": [int], "run": [int], "broken": [bool], "step": [int], "steps": [int], "radius": [(*NUMBER, None)],
    "ended": [bool], "margin": [(*NUMBER, None)], "predicted": [int], "fragile": [bool],
}  # fmt: skip
ENTRY = {**COLUMNS, "phase": int, "unconfirmed": int, "not_finite": int, "slot_steps": NUMBER, "seconds": NUMBER}
"""What a line of a log holds: columns over the runs that were over together, and numbers of all of them."""


class Examples(NamedTuple):
    """What became of each example of a split, (n,) each. Images that are misclassified when clean are not attacked.

    radius                                               the smallest at which it is seen to break: 0 where it is
                                                         misclassified when clean, infinity where nothing breaks it
    attack, run, step                                    what broke it: which attack, in which of its runs, after how
                                                         many steps; NONE where nothing did
    margin, predicted                                    of the image that broke it; where it stands, of the last
                                                         iterate that came nearest
    fragile                                              whether floating point might change the verdict
    """

    label: np.ndarray
    radius: np.ndarray
    attack: np.ndarray
    run: np.ndarray
    step: np.ndarray
    margin: np.ndarray
    predicted: np.ndarray
    fragile: np.ndarray


class Phase(NamedTuple):
    """One of the attacks at one radius; eps None: at the attack's own."""

    index: int
    attack: Attack
    eps: float | None

    @property
    def name(self) -> str:
        """The attack's, and the radius where that is not its own."""
        return self.attack.name if self.eps is None else f"{self.attack.name}, at {radius_text(self.eps)}"

    @property
    def limit(self) -> np.float32:
        """Examples that break at no radius up to this one are attacked; the smallest norm is looked for in all."""
        return (
            np.float32(0)
            if self.attack.aim == "norm"
            else np.finfo(np.float32).max
            if self.eps is None
            else np.float32(self.eps)
        )


def for_classes(robustness: Robustness, classes: int) -> tuple[Robustness, list[str]]:
    """The attacks as they are on so few classes, and a line on each whose score is another there.

    Its name says what it raises, and with it every label, row and report.
    """
    runs, lines = [], []
    for attack in robustness.runs:
        formula = substitute(attack.score, classes)
        if formula:
            score = attack.score.__name__
            lines.append(f"{attack.name}: {classes} classes are too few for {score}; it raises {formula} instead")
            attack = attack._replace(name=f"{attack.name} ({formula} for {score}: {classes} classes)")
        runs.append(attack)
    return robustness._replace(runs=tuple(runs)), lines


def is_entry(value: Any, n: int) -> bool:
    """Whether a line of a log is what `verdicts.judge` says of some of n examples."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)  # infinite: a radius that was not found
    if mismatch(plain, ENTRY) or len({len(value[name]) for name in COLUMNS}) != 1:
        return False
    return all(0 <= index < n for index in value["ids"]) and min(value["run"], default=0) >= 0


class Attacked(NamedTuple):
    """measures; cost per image of the split; seconds without compilation; what became of each example; the images that
    are kept."""

    measures: dict[str, Measure | Curve]
    cost: Cost
    seconds: float
    examples: Examples
    kept: adversarial.Kept | None


def attack_split(
    model: Model,
    variables: Variables,
    data: Split,
    robustness: Robustness,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    text: str = "robust",
    progress: bool | None = None,
    log: Log | None = None,
    keep: str | None = None,
) -> Attacked:
    """Every attack of `robustness` on the examples that stand, at each of its radii from the smallest to the largest.

    Examples that are misclassified when clean are broken and never attacked. `robust_accuracy` is the share that no
    attack breaks, with Wilson's 95 % interval, and where the data have groups that of the worst and of each;
    `unconfirmed` counts runs that met a misclassified iterate which the forward pass afterwards does not confirm: those
    stand as unbroken. `fragile` counts verdicts that floating point might change; `utilisation` is the share of the
    slots' steps that an example needed. What breaks at a radius breaks at every larger one, and is not attacked there
    again. What a `log` holds is not attacked again. keep: the images of "all" examples, or of a "few" that are right
    when clean; None: of none. An attack's batches are as wide as those that stand when it begins fill, at most
    `data.batch`.
    """
    check_model(model)
    if not isinstance(robustness, Robustness):
        raise UserError(f"attack_split: give robust(pgd(linf(8/255))) or a curve, got {robustness!r}")
    log = log or Log(None, {})
    rows, images, seconds = _clean(model, variables, data, mesh, log, f"{text}: clean", progress)
    logits, labels = rows["logits"], rows["label"]
    check_outputs(text, logits, labels)
    n, cost = len(labels), Cost(1, 0)
    clean = seen(logits, labels)
    none = lambda: np.full(n, NONE, np.int32)
    radius = np.where(clean.wrong, 0, np.inf).astype(np.float32)
    examples = Examples(labels, radius, none(), none(), none(), clean.margin, clean.predicted, clean.fragile)
    kept = _kept(keep, data, log, clean.wrong, mesh)
    entries, after, fitting = [], [], {}
    logged = [entry for entry in log.entries if "phase" in entry]
    if not all(is_entry(entry, n) for entry in logged):  # damaged, or a stranger's: all is measured again
        logged = []
    for number, phase in enumerate(_phases(robustness)):
        stands = examples.radius > phase.limit
        runs = np.where(stands, 0, phase.attack.runs)
        done = [entry for entry in logged if entry["phase"] == number]
        for entry in done:
            _enter(examples, entry, phase.index)
            runs[entry["ids"]] = np.where(entry["ended"], phase.attack.runs, np.array(entry["run"]) + 1)
        left = int((runs < phase.attack.runs).sum())
        # By those that stand when an attack begins, which a stop does not change; at a larger radius of a curve it is
        # compiled anew only for half the width.
        narrow = narrowed(data, int(stands.sum()), mesh)
        if 2 * narrow.batch <= fitting.setdefault(phase.index, narrow).batch:
            fitting[phase.index] = narrow
        attack, source = _divided(phase.attack, mesh)
        parts, key = queue.functions(attack, model, mesh), jax.random.fold_in(root(seed), phase.index)
        options = {"eps": phase.eps, "source": source, "points": kept is not None, "mesh": mesh}
        with bar(
            int(stands.sum()),
            f"{text}: {phase.name}",
            enabled=progress if stands.any() else False,
            done=int(stands.sum()) - left,
        ) as shown:
            given = (fitting[phase.index], key, runs, logits, labels)
            for entry, points in queue.work(parts, attack, variables, *given, **options, watch=shown.at_most):
                newly = _enter(examples, entry, phase.index)
                if kept is not None:
                    kept.put(np.array(entry["ids"])[newly], points[newly])
                done.append({"phase": number, **entry})
                log.append(done[-1])
                shown.update(sum(entry["ended"]))
        made, steps = sum(len(entry["ids"]) for entry in done), sum(sum(entry["steps"]) for entry in done)
        if made:
            bound_to = None if attack.source is None else bind(attack.source.model, source)
            of_a_step = cost_of(bound(attack, bound_to).cost, model, variables, images)
            cost += made / n * Cost(1, 0) + steps / n * of_a_step
        entries += done
        after.append(float((examples.radius > phase.limit).mean()))
    seconds += sum(entry["seconds"] for entry in entries)
    summary = _curve if robustness.eps else _robust
    measures = summary(robustness, examples, after, rows.get("group")) | _details(entries, examples, clean.wrong)
    return Attacked(measures, cost, seconds, examples, kept)


def _divided(attack: Attack, mesh: Mesh | None) -> tuple[Attack, Variables | tuple[()]]:
    """The attack, whose source is a network without its variables, and those variables; () where it has none."""
    if attack.source is None:
        return attack, ()
    if isinstance(attack.source, str):
        raise UserError(f"'{attack.name}': load '{attack.source}' and give it as Network(model, variables, name)")
    return attack._replace(source=attack.source._replace(variables=None)), queue.placed(attack.source.variables, mesh)


def _kept(keep, data, log, wrong, mesh):
    """Where images are kept, the clean ones at first; None where none are, or a few of those that are right when none
    is."""
    right = np.flatnonzero(~wrong).astype(np.int32)
    if keep is None or (keep == "few" and not len(right)):
        return None

    def clean(ids):
        for part, batch in data.batches(ids):
            yield part, np.asarray(jax.device_get(whole(mesh)(batch["image"])))[: len(part)]

    few = right[np.linspace(0, len(right) - 1, min(adversarial.PICTURES, len(right))).round().astype(int)]
    some = few if len(few) else np.zeros(1, np.int32)  # for the shape of an image
    by_id = {int(index): image for part, images in clean(some) for index, image in zip(part, images)}
    few_clean = np.stack([by_id[int(index)] for index in some])[: len(few)]
    ids = np.arange(len(wrong), dtype=np.int32) if keep == "all" else few
    path = None if log.path is None else log.path.with_suffix(".npy")
    kept = adversarial.Kept(path, ids, few, few_clean, resumes=any("phase" in entry for entry in log.entries))
    if not kept.complete:
        # The images of the attacks that are noted there are lost: they are made again.
        log.entries = [entry for entry in log.entries if "phase" not in entry]
        for part, images in clean(ids) if keep == "all" else [(few, few_clean)]:
            kept.put(part, images)
    return kept


def _phases(robustness: Robustness) -> list[Phase]:
    """What is to be done, in order: attacks on the norm once, all others at every radius."""
    attacks = list(enumerate(robustness.runs))
    if not robustness.eps:
        return [Phase(index, attack, None) for index, attack in attacks]
    norms = [Phase(index, attack, None) for index, attack in attacks if attack.aim == "norm"]
    others = [(index, attack) for index, attack in attacks if attack.aim != "norm"]
    return norms + [Phase(*pair, eps) for eps in robustness.eps for pair in others]


def _enter(examples: Examples, entry: dict[str, Any], attack: int) -> np.ndarray:
    """Put the verdicts of an entry into the arrays of the split; which of its examples (m,) broke by it."""
    ids, broken = np.array(entry["ids"]), np.array(entry["broken"])
    of = lambda name: np.array(entry[name], getattr(examples, name).dtype)
    newly = broken & (of("radius") < examples.radius[ids])
    nearer = ~broken & np.isinf(examples.radius[ids]) & (of("margin") > examples.margin[ids])
    examples.fragile[ids] = np.where(newly, of("fragile"), examples.fragile[ids] | (of("fragile") & ~broken))
    for name in ("margin", "predicted"):
        getattr(examples, name)[ids[newly | nearer]] = of(name)[newly | nearer]
    for name in ("radius", "run", "step"):
        getattr(examples, name)[ids[newly]] = of(name)[newly]
    examples.attack[ids[newly]] = attack
    return newly


def _robust(
    robustness: Robustness, examples: Examples, after: Sequence[float], group: np.ndarray | None
) -> dict[str, Measure | Curve]:
    names, n = [attack.name for attack in robustness.runs], len(examples.label)
    clean = float((examples.radius > 0).mean())
    about, stands = Measure(better="higher", label=f"accuracy under {', '.join(names)}"), np.isinf(examples.radius)
    measures = {"robust_accuracy": share(stands, about), **by_group(stands, group, about, "robust_accuracy")}
    measures["clean_accuracy"] = _clean_accuracy(examples)
    if len(names) > 1:  # the cascade: what each of the attacks leaves
        left = lambda name: Measure(better="higher", label=f"accuracy after {name}", main=False)
        measures |= {f"after_{i}": left(name)._replace(value=after[i - 1], n=n) for i, name in enumerate(names, 1)}
    axes = ("attacks done", "accuracy")
    return measures | {"after_runs": Curve(list(range(len(names) + 1)), [clean, *after], axes, "accuracy by attack")}


def _curve(
    robustness: Robustness, examples: Examples, after: Sequence[float], group: np.ndarray | None
) -> dict[str, Measure | Curve]:
    radii = [np.float32(eps) for eps in robustness.eps]
    norm = next((attack.norm for attack in robustness.runs if attack.norm), "")
    ball = lambda eps: f"{norm}({radius_text(eps)})" if norm else radius_text(eps)
    about = lambda eps: Measure(better="higher", label=f"accuracy at {ball(eps)}")
    measures = {}
    for i, (eps, radius) in enumerate(zip(robustness.eps, radii), 1):
        stands, name = examples.radius > radius, f"accuracy_at_{i}"
        measures |= {name: share(stands, about(eps)), **by_group(stands, group, about(eps), name)}
    clean, attacked = _clean_accuracy(examples), examples.radius > 0
    accuracies = [measures[f"accuracy_at_{i}"].value for i in range(1, len(radii) + 1)]
    details = {"clean_accuracy": clean}
    for i, (eps, smaller) in enumerate(zip(robustness.eps[1:], radii), 2):
        carried = int((attacked & (examples.radius <= smaller)).sum())
        label = f"images at {ball(eps)} that broke at a smaller radius already"
        details[f"carried_to_{i}"] = Measure(carried, n=len(attacked), label=label, main=False)
    axes = (f"epsilon, {norm}" if norm else "epsilon", "accuracy")
    over = Curve([0.0, *robustness.eps], [clean.value, *accuracies], axes, "accuracy over epsilon")
    return measures | details | {"over_eps": over}


def _clean_accuracy(examples):
    return share(examples.radius > 0, Measure(better="higher", label="clean accuracy", main=False))


def _details(entries: Sequence[dict[str, Any]], examples: Examples, clean_wrong: np.ndarray) -> dict[str, Measure]:
    """How the attacks went, beside what they found."""
    n, attacked = len(clean_wrong), int((~clean_wrong).sum())
    detail = lambda value, label, unit="": Measure(value, n=n, label=label, unit=unit, main=False)
    over = lambda name: sum(entry[name] for entry in entries)
    over_all = lambda name: sum(map(sum, (entry[name] for entry in entries)))
    slots = sum(entry["slot_steps"] for entry in entries)
    measures = {
        "attacked": detail(attacked, "images attacked"),
        "mean_steps": detail(over_all("step") / max(attacked, 1), "steps until the break", "steps"),
        "unconfirmed": detail(over("unconfirmed"), "breaks that a forward pass did not confirm"),
        "not_finite": detail(over("not_finite"), "breaks where the logits are not finite"),
        "fragile": detail(int(examples.fragile.sum()), "verdicts that floating point might change"),
    }
    used = detail(over_all("steps") / max(slots, 1), "share of the slots' steps that an image needed")
    return measures | ({"utilisation": used} if slots else {})


def _clean(model, variables, data, mesh, log, text, progress):
    """By row of the split logits (n, k), label and, where the data have them, group (n,); the shape of a batch's
    images, and the seconds."""
    predict = queue.clean_logits(model, mesh)

    def compute(batch, count):
        about = {name: batch[name] for name in ("label", "group") if name in batch}
        rows = jax.device_get({"logits": predict(variables, batch["image"]), **whole(mesh)(about)})
        return {name: value[:count] for name, value in rows.items()}

    compile = lambda batch: predict.lower(variables, batch["image"]).compile()
    return by_batches(data, compile, compute, log, text, progress)


@functools.lru_cache(maxsize=32)
def whole(mesh):
    """The identity, with a result that every process can read."""
    return jax.jit(lambda values: values, out_shardings=None if mesh is None else replicated(mesh))
