"""Every study by one driver: its arms with every seed, each measure with its interval, and what decides a claim.

    python experiments/study.py shapes [--arms gap 'top_gap .14'] [--seeds 0 1]
    python experiments/study.py systems                 # sgdrop, norm_regularised, art and guided
    python experiments/study.py shapes --table          # its table, from results/shapes.json
    python experiments/study.py shapes --arms gap --seeds 0 --check  # once more, beside the stored numbers

`_studies.py` holds the table. Within a study all arms have the same network, data, steps and seeds. One seed of one arm
is trained and evaluated at a time, and results/<study>.json is written after each; a run that is there is not made
again. A difference of two arms is paired by seed and given with its 95 % t interval; one whose interval holds 0 is
"undecided", and so is every difference of one seed. A claim is "reproduced" if the method differs on its side from the
plain control and from the one that decides, "not reproduced" if it lies on the other side of one of them, else
"undecided"; "undefined" where a run has no such number. A claim about a number of the method itself, such as over 50 %,
is judged by the 95 % interval over images: "reproduced" if it lies beyond the number in every seed, "not reproduced"
if it does not reach it in one. No interval is corrected for the number of rows.

results/<study>.json, of one form for all:

    study, config                            its name, its config file
    runs {arm: {seed: {
        overrides, explain                   keys that the arm sets, with their texts; what stands for EXPLAIN
        rows                                 of measure.results.to_json, without curves
        steps, train_cpu_seconds, evaluate_cpu_seconds
        command, commit, versions, ...}}}    run.provenance: with what, and on what hardware
    comparison {"split | evaluator | name": {arms {arm: {mean, std}}, differences {"arm - control": {mean, low, high,
    verdict}}}} claims [{claim, measure, verdict}]

Where a study keeps its networks, results/weights/<study>_<arm>_seed<seed>.safetensors has them, kernels in half
precision (1 MB each at most), and all is measured on what that file gives back: `topgap evaluate --config
configs/<config> --weights FILE`, with the keys that the arm sets, repeats it.

The comparison holds the measures that the study shows or claims, over the seeds that every arm has; standard deviations
are those of the sample, null for one seed. All of it follows from `runs`.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shutil import copy
from typing import Any

import jax
import numpy as np
from _studies import STUDIES, SYSTEMS, Arm, Claim, Study
from scipy import stats

from topgap_jax import pretrained, setup
from topgap_jax.measure import results
from topgap_jax.progress import write_text
from topgap_jax.run import checkpoint
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit
from topgap_jax.run.provenance import provenance
from topgap_jax.setup import config as configs
from topgap_jax.setup import expressions
from topgap_jax.types import Measure

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "results" / "weights"
CHECKED = 1e-6  # relative: below this a number that was made again is the stored one


# The runs


def experiment(study: Study, arm: Arm, seed: int) -> setup.Experiment:
    """The arm's config with its data and its model."""
    return setup.experiment(ROOT / "configs" / study.config, [("seed", str(seed)), *arm.overrides.items()], arm.of)


def overrides(study: Study, arm: Arm) -> dict[str, str]:
    """The keys of the config that the arm sets, with their texts."""
    return {**configs.load(ROOT / "configs" / study.config).arms.get(arm.of, {}), **arm.overrides}


def evaluators(study: Study, arm: Arm) -> list[tuple[str, str]]:
    """(split, text) of everything that is measured of the arm."""
    if study.evaluators:
        return [(split, text.replace("EXPLAIN", arm.explain)) for split, text in study.evaluators]
    config = configs.load(ROOT / "configs" / study.config).config
    return [(s, e) for s in expressions.split_list(config.test) for e in expressions.split_list(config.evaluators)]


def folder(name: str, arm_name: str, seed: int, runs: Path) -> Path:
    """Where a run is trained: that of the arm whose training it shares."""
    trained_as = STUDIES[name].arms[arm_name].trained_as or arm_name
    return runs / f"{name}_{trained_as}_seed{seed}".replace(" ", "_")


def weights(name: str, arm_name: str, seed: int, runs: Path) -> Path:
    """The file of a trained network that its study keeps."""
    return Path(f"{folder(name, arm_name, seed, runs)}.safetensors")


def train(name: str, arm_name: str, seed: int, runs: Path) -> None:
    """Train one seed of one arm; returns at once where that is done, refuses a folder that another config has made."""
    study = STUDIES[name]
    trained = experiment(study, study.arms[arm_name], seed)
    file = ROOT / "configs" / study.config
    fit(trained.config, folder(name, arm_name, seed, runs), parts=setup.parts(trained), file=file)


def load(name: str, arm_name: str, seed: int, runs: Path) -> setup.Loaded:
    """The trained model of a run."""
    study = STUDIES[name]
    return setup.restored(experiment(study, study.arms[arm_name], seed), folder(name, arm_name, seed, runs), "last")


def narrowed(loaded: setup.Loaded, path: Path) -> setup.Loaded:
    """The network as a file of weights gives it back, which is written first: kernels in half precision."""
    config = loaded.experiment.config
    narrow = lambda leaf: np.asarray(leaf, np.float16 if leaf.ndim > 1 else np.float32)
    normalised = {key: ", ".join(map(str, config[key])) for key in ("mean", "std")}
    pretrained.save(path, jax.tree.map(narrow, loaded.variables), metadata=normalised)
    variables = pretrained.load(path, loaded.experiment.model, image_shape=(*config.image_size, 3))
    return loaded._replace(variables=variables, weights=path.name)


def make(name: str, arm_name: str, seed: int, runs: Path) -> dict[str, Any]:
    """Train (or continue, or take) and evaluate one seed of one arm; what `evaluation.json` holds of it stays."""
    study = STUDIES[name]
    arm, workdir = study.arms[arm_name], folder(name, arm_name, seed, runs)
    train(name, arm_name, seed, runs)
    before = cpu_seconds()
    loaded = load(name, arm_name, seed, runs)
    if study.keeps:
        loaded = narrowed(loaded, weights(name, arm_name, seed, runs))
    evaluation = results.read(workdir / results.FILE)
    rows = {row.key[:2]: row for row in evaluation.rows if evaluation.weights == loaded.weights and not row.overrides}
    wanted = evaluators(study, arm)
    for split, text in wanted:
        if (split, text) not in rows:
            rows[split, text] = setup.evaluate(loaded, splits=split, evaluators=text)[0]
    _, meta = checkpoint.restore(workdir, "last", {})
    return {
        "overrides": overrides(study, arm),
        "explain": arm.explain,
        "rows": [results.to_json(rows[key]._replace(measures=rows[key].numbers)) for key in wanted],
        "steps": meta["step"],
        "train_cpu_seconds": meta["cpu_seconds"],
        "evaluate_cpu_seconds": cpu_seconds() - before,
        **provenance(),
    }


def is_there(study: Study, arm: Arm, run: Mapping[str, Any] | None) -> bool:
    """Whether a stored run is of this arm as the table has it now, with everything that is measured."""
    if run is None or (run["overrides"], run["explain"]) != (overrides(study, arm), arm.explain):
        return False
    return {(row["split"], row["evaluator"]) for row in run["rows"]} >= set(evaluators(study, arm))


def stored(name: str) -> dict[str, Any]:
    """results/<name>.json, without runs where there is none."""
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}}


def store(name: str, arm_name: str, seed: int, run: Mapping[str, Any]) -> None:
    """Put a run into results/<name>.json. The file is read again: another process may have written its own
    meanwhile."""
    study, runs = STUDIES[name], stored(name)["runs"]
    runs.setdefault(arm_name, {})[str(seed)] = run
    runs = {arm: dict(sorted(runs[arm].items(), key=lambda item: int(item[0]))) for arm in study.arms if arm in runs}
    write_text(ROOT / "results" / f"{name}.json", json.dumps(result(name, runs), indent=1) + "\n")


def result(name: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    """What results/<name>.json holds."""
    study = STUDIES[name]
    comparison = compare(study, runs)
    return {
        "study": name,
        "config": f"configs/{study.config}",
        "runs": runs,
        "comparison": comparison,
        "claims": [
            {
                "claim": claim.words,
                "measure": claim.measure,
                "verdict": verdict(study, runs, comparison, claim),
            }
            for claim in study.claims
        ],
    }


# Their comparison


def measures(study: Study, arm_name: str, rows: Iterable[results.Row]) -> dict[str, Measure]:
    """{"split | evaluator | name": measure} of a run's rows; EXPLAIN stands for the arm's own explanation."""
    own = {text.replace("EXPLAIN", study.arms[arm_name].explain): text for _, text in study.evaluators}
    return {
        f"{row.split} | {own.get(row.evaluator, row.evaluator)} | {name}": measure
        for row in rows
        for name, measure in row.numbers.items()
    }


def numbers(study: Study, arm_name: str, rows: Iterable[results.Row]) -> dict[str, float | None]:
    """The values of `measures`."""
    return {key: measure.value for key, measure in measures(study, arm_name, rows).items()}


def compare(study: Study, runs: Mapping[str, Any]) -> dict[str, Any]:
    """The measures that the study shows or claims: each arm that has been run over its seeds, and the differences that
    decide, paired by seed; nothing before control and method have been."""
    values = {
        arm: {seed: numbers(study, arm, map(results.from_json, run["rows"])) for seed, run in runs[arm].items()}
        for arm in study.arms
        if runs.get(arm)
    }
    control = next(iter(study.arms))
    if not {control, study.method, study.decides} <= set(values):
        return {}
    seeds = sorted(set.intersection(*map(set, values.values())), key=int)
    pairs = [(arm, control) for arm in values if arm != control]
    pairs += [(study.method, study.decides)] * (study.decides != control)
    comparison = {}
    for measure in [key for key in values[control][seeds[0]] if is_shown(study, key)] if seeds else []:
        columns = {arm: [values[arm][seed].get(measure) for seed in seeds] for arm in values}
        if any(value is None for column in columns.values() for value in column):
            continue
        comparison[measure] = {
            "arms": {arm: mean_and_std(column) for arm, column in columns.items()},
            "differences": {f"{a} - {b}": paired(columns[a], columns[b]) for a, b in pairs},
        }
    return comparison


def is_shown(study: Study, measure: str) -> bool:
    """Whether "split | evaluator | name" is in the study's table or among its claims."""
    return measure.split(" | ", 1)[1] in study.shown or measure in {claim.measure for claim in study.claims}


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """Over seeds; the standard deviation is that of the sample, None for one value."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Mean difference a - b with its 95 % t interval (None for one pair) and a verdict: "higher", "lower",
    "undecided"."""
    difference = np.subtract(a, b)
    if not np.isfinite(difference).all():
        raise ValueError(f"not every seed has a number: {a} and {b}")
    n, mean = len(difference), float(difference.mean())
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "verdict": "undecided"}
    half = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    verdict = "undecided" if abs(mean) <= half else ("higher" if mean > 0 else "lower")
    return {"mean": mean, "low": mean - half, "high": mean + half, "verdict": verdict}


def verdict(study: Study, runs: Mapping[str, Any], comparison: Mapping[str, Any], claim: Claim) -> str:
    """What is to be said of a claim."""
    return judge(study, comparison, claim) if claim.bound is None else reaches(study, runs, claim)


def judge(study: Study, comparison: Mapping[str, Any], claim: Claim) -> str:
    """A claim by the method's differences from the plain control and from the control that decides."""
    if claim.measure not in comparison:
        return "undefined"
    differences = comparison[claim.measure]["differences"]
    sides = {"higher": claim.sign, "lower": -claim.sign, "undecided": 0}
    controls = {next(iter(study.arms)), study.decides}
    each = [sides[differences[f"{study.method} - {control}"]["verdict"]] for control in controls]
    if min(each) > 0:
        return "reproduced"
    return "not reproduced" if min(each) < 0 else "undecided"


def reaches(study: Study, runs: Mapping[str, Any], claim: Claim) -> str:
    """A claim about a number of the method itself, by its interval over images in each seed."""
    rows = [map(results.from_json, run["rows"]) for run in runs.get(study.method, {}).values()]
    found = [measures(study, study.method, each).get(claim.measure) for each in rows]
    if not found or any(measure is None or measure.low is None for measure in found):
        return "undefined"
    beyond = [sorted(claim.sign * (end - claim.bound) for end in (measure.low, measure.high)) for measure in found]
    if all(nearest > 0 for nearest, _ in beyond):
        return "reproduced"
    return "not reproduced" if any(farthest < 0 for _, farthest in beyond) else "undecided"


# Their tables


def table(study: Study, comparison: Mapping[str, Any]) -> str:
    """Markdown: of the control mean ± standard deviation, of each other arm that has been run its mean and its
    difference from the control."""
    control, *others = next(iter(comparison.values()))["arms"] if comparison else study.arms
    last = [f"{study.method} - {study.decides}"] * (study.decides != control)
    digits = 3 if comparison and next(iter(comparison.values()))["arms"][control]["std"] is not None else 4
    head = ["split", "measure", *(f"`{arm}`" for arm in (control, *others)), *(f"`{pair}`" for pair in last)]
    lines = [head, ["---"] * len(head)]
    splits = dict.fromkeys(measure.split(" | ")[0] for measure in comparison)
    rows = [(split, key) for split in splits for key in study.shown if f"{split} | {key}" in comparison]
    for split, key in rows:
        row = comparison[f"{split} | {key}"]
        cells = [spread(row["arms"][control], digits)]
        for arm in others:
            change = interval(row["differences"][f"{arm} - {control}"], digits)
            cells.append(f"{row['arms'][arm]['mean']:.{digits}f}; {change}")
        lines.append([split, study.shown[key], *cells, *(interval(row["differences"][pair], digits) for pair in last)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def systems_table(names: Sequence[str], comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: each system's claims beside its controls, with their verdicts."""
    head = [
        "system", "turned on by", "the paper claims",
        "measured here: method; minus plain; minus the control that decides",
        "accuracy: plain, method, deciding control", "verdict",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name in names:
        study, comparison = STUDIES[name], comparisons[name]
        controls = list(dict.fromkeys((next(iter(study.arms)), study.decides)))
        cells, verdicts = [], []
        for claim in study.claims:
            verdicts.append(f"{claim.words}: **{judge(study, comparison, claim)}**")
            if row := comparison.get(claim.measure):
                differences = [interval(row["differences"][f"{study.method} - {control}"]) for control in controls]
                cells.append(f"{claim.words} {row['arms'][study.method]['mean']:.3f}; {'; '.join(differences)}")
        accuracy = comparison["test | accuracy() | accuracy"]["arms"]
        arms = dict.fromkeys((controls[0], study.method, study.decides))
        paper = study.paper if " " in study.paper else f"[{study.paper}](https://arxiv.org/abs/{study.paper})"
        lines.append([
            f"{study.title} ({paper})", study.turned_on, study.claimed,
            f"{'<br>'.join(cells)} (decides: {study.decides})",
            ", ".join(spread(accuracy[arm]) for arm in arms), "<br>".join(verdicts),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(row: Mapping[str, float | None], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    return f"{row['mean']:.{digits}f}" + ("" if row["std"] is None else f" ± {row['std']:.{digits}f}")


def interval(change: Mapping[str, Any], digits: int = 3) -> str:
    """A difference with its interval, bold where it is decided."""
    if change["low"] is None:
        return f"{change['mean']:+.{digits}f}"
    text = f"{change['mean']:+.{digits}f} [{change['low']:+.{digits}f}, {change['high']:+.{digits}f}]"
    return text if change["verdict"] == "undecided" else f"**{text}**"


# The command


def check(study: Study, arm_name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a run that was made again has other than the stored one, a line each."""
    old, new = (numbers(study, arm_name, map(results.from_json, run["rows"])) for run in (before, after))
    lines = [f"  {key}: only {'stored' if key in old else 'now'}" for key in old.keys() ^ new.keys()]
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        if a != b and (a is None or b is None or abs(a - b) > CHECKED * max(abs(a), abs(b))):
            lines.append(f"  {key}: stored {a}, now {b}")
    return [f"{len(old.keys() & new.keys())} numbers, {len(lines)} of them differ", *sorted(lines)]


def cpu_seconds() -> float:
    """Of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)}, or systems: {SYSTEMS}")
    parser.add_argument("--arms", nargs="*", metavar="ARM", help="(default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, help="(default: all of the study)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/study, of --check runs/check)")
    parser.add_argument(
        "--check", action="store_true", help="make runs once more and say what differs; writes no result"
    )
    parser.add_argument("--table", action="store_true", help="print the stored results as a table")
    arguments = parser.parse_args()
    names = [n for name in arguments.studies for n in (SYSTEMS if name == "systems" else (name,))]
    for name in names:
        if name not in STUDIES:
            parser.error(f"there is no study '{name}'; choose from {', '.join(STUDIES)}, systems")
        for arm in set(arguments.arms or ()) - set(STUDIES[name].arms):
            parser.error(f"{name} has no arm '{arm}'; it has {', '.join(map(repr, STUDIES[name].arms))}")
    if arguments.table:
        for name in names:
            print(table(STUDIES[name], stored(name)["comparison"]))
        return
    print(configure_cpu(), file=sys.stderr)
    runs = arguments.runs or Path("runs/check" if arguments.check else "runs/study")
    if not names:
        parser.error("name a study")
    seeds = {name: STUDIES[name].seeds if arguments.seeds is None else arguments.seeds for name in names}
    for seed in sorted({seed for each in seeds.values() for seed in each}):
        for name in (name for name in names if seed in seeds[name]):
            for arm_name in arguments.arms or STUDIES[name].arms:
                study, before = STUDIES[name], stored(name)["runs"].get(arm_name, {}).get(str(seed))
                if is_there(study, study.arms[arm_name], before) and not arguments.check:
                    continue
                run = make(name, arm_name, seed, runs)
                print(f"{name}, {arm_name}, seed {seed}: {run['train_cpu_seconds']:.0f} CPU seconds of training, "
                      f"{run['evaluate_cpu_seconds']:.0f} of evaluation", flush=True)  # fmt: skip
                if arguments.check:
                    print("\n".join(check(study, arm_name, before, run)), flush=True)
                else:
                    if study.keeps:
                        KEPT.mkdir(exist_ok=True)
                        copy(weights(name, arm_name, seed, runs), KEPT)
                    store(name, arm_name, seed, run)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
