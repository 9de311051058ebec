"""Five systems, each beside its plain control: is the effect that its paper claims there, and is it the method's own?

    python experiments/systems.py [--systems sgdrop art] [--seeds 0 1 2]
    python experiments/systems.py --table         # README's table, from results/systems.json
    python experiments/systems.py --page          # runs/study/systems/systems.html: each system's maps beside its control's

An arm is a config with overrides. Within a system all arms have the same network (at most 10 MMAC), data, steps and seeds. The
first arm is the plain control; `decides` is the arm that must be beaten too before an effect is the method's own. A claim is
"reproduced" if both differences, paired by seed, lie on its side with their 95 % t intervals, "not reproduced" if one lies on
the other side, else "undecided". Top-GAP's row is read from results/shapes.json. Runs that are there are not made again.
"""

import argparse
import base64
import hashlib
import html
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapes
from _study import cpu_seconds, paired

from topgap_jax import setup
from topgap_jax.progress import write_text
from topgap_jax.report import sheets
from topgap_jax.run import checkpoint
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit
from topgap_jax.run.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "systems.json"
SEEDS = (0, 1, 2)


class Claim(NamedTuple):
    """`measure` as "split | evaluator | name"; sign: +1 if the paper says that the method raises it."""

    measure: str
    words: str
    sign: int


class Arm(NamedTuple):
    """Overrides of the system's config, the explanation that stands for EXPLAIN, and the arm whose run it shares."""

    overrides: tuple[tuple[str, str], ...] = ()
    explain: str = "gradient()"
    trained_as: str = ""


class System(NamedTuple):
    title: str
    paper: str
    turned_on: str
    claimed: str
    config: str
    arms: dict[str, Arm]
    method: str
    decides: str
    evaluators: tuple[tuple[str, str], ...]
    claims: tuple[Claim, ...]


NETWORK = (
    "classifier(small_resnet(widths=(12, 24, 48), stem=12, stem_kernel=3, stem_stride=1), map_head(pool), classes=classes, "
    "mean=mean, std=std, dtype=dtype)"
)
ACCURACY = "test | accuracy() | accuracy"
_SPREAD = "measures(integrated(), gini(), extent())"
_CAM_SPREAD = "measures(grad_cam('stage3'), gini(), extent())"  # what the drop flattens in training: shown, not claimed
_DELETION = "measures(EXPLAIN, deletion(), insertion(), labels='predicted')"
_DELETION_BLUR = "measures(EXPLAIN, deletion(substrate='blur'), labels='predicted')"
_DELETION_BLACK = "measures(EXPLAIN, deletion(substrate=0.0), labels='predicted')"
_GINI = "measures(gradient(reduce='abs_sum'), gini(), extent(), energy())"
_MAP = "gradient(reduce='abs_sum')"
_MOVED = f"attributional_robustness({_MAP}, topk_attack({_MAP}, linf(eps), steps=20, restarts=2))"

SYSTEMS = {
    "sgdrop": System(
        "SGDrop",
        "2409.17370",
        "`with_drop(model, 'stage3', sgdrop(rate=linear(0, .1, total_steps)))`",
        "higher accuracy on little data, wider maps, higher neuron coverage",
        "sgdrop.py",
        {
            "plain": Arm((("model", NETWORK),)),
            "sgdrop": Arm(),
            "random_matched": Arm(
                (
                    (
                        "model",
                        f"with_drop({NETWORK}, 'stage3', random_matched(sgdrop(rate=linear(0, rate, total_steps))))",
                    ),
                )
            ),
        },
        "sgdrop",
        "random_matched",
        (
            ("train", "accuracy()"),
            ("test", "accuracy()"),
            ("test[:1000]", _SPREAD),
            ("test[:1000]", _CAM_SPREAD),
            ("test[:1000]", "coverage('stage2', 'stage3')"),
        ),
        (
            Claim(ACCURACY, "accuracy", 1),
            Claim(f"test[:1000] | {_SPREAD} | effective_area", "effective area of integrated gradients", 1),
            Claim("test[:1000] | coverage('stage2', 'stage3') | neuron_coverage", "neuron coverage", 1),
        ),
    ),
    "norm_regularised": System(
        "Norm-regularised training",
        "2404.04647",
        "`norm_regularised(l1_norm(eps))`",
        "sparser gradient maps",
        "norm_regularised.py",
        {
            "standard": Arm((("objective", "standard()"),)),
            "l1_norm": Arm((("objective", "norm_regularised(l1_norm(eps))"),)),
            "group_norm": Arm((("objective", "norm_regularised(group_norm(13.9 * eps, 8))"),)),
            # As large in the Euclidean norm as l1_norm's perturbation, 110.9 = 12,288 ** .5, but its penalty is not of the l1 kind.
            "l2_norm": Arm((("objective", "norm_regularised(l2_norm(110.9 * eps))"),)),
            # The dual twin of l1_norm, so it decides nothing: adversarial training of the same radius.
            "r_fgsm": Arm((("objective", "adversarial(r_fgsm(linf(eps)))"),)),
        },
        "l1_norm",
        "l2_norm",
        (
            ("test", "accuracy()"),
            ("test[:1000]", _GINI),
            ("test[:500]", "robust(pgd(linf(eps), steps=20))"),
        ),
        (Claim(f"test[:1000] | {_GINI} | gini", "Gini index of the gradient map", 1),),
    ),
    "art": System(
        "ART",
        "1911.13073",
        "`art(mean=mean, std=std)`",
        "explanations that a small change of the image does not move",
        "art.py",
        {
            "standard": Arm((("objective", "standard()"),)),
            "art": Arm(),
            # The same attack on the alignment, and no alignment loss.
            "attack alone": Arm((("objective", "art(mean=mean, std=std, weight=0)"),)),
        },
        "art",
        "attack alone",
        (("test", "accuracy()"), ("test[:500]", _MOVED), ("test[:500]", "robust(pgd(linf(eps), steps=20))")),
        (
            Claim(f"test[:500] | {_MOVED} | topk_intersection", "top-k intersection of the attacked gradient map", 1),
            Claim(f"test[:500] | {_MOVED} | kendall_tau_b", "its Kendall tau-b", 1),
        ),
    ),
    "guided": System(
        "Guided non-linearity",
        "ICPR 2020",
        "`integrated(rules=guided)`",
        "lower deletion score than integrated gradients",
        "guided.py",
        {
            "integrated": Arm(explain="integrated()"),
            "guided": Arm(explain="integrated(rules=guided)", trained_as="integrated"),
            "guided_upsampled": Arm(explain="integrated(rules=guided_upsampled)", trained_as="integrated"),
            "one step": Arm(
                explain="integrated(steps=1, rule='riemann_right', rules=guided_backprop)", trained_as="integrated"
            ),
            "average": Arm(explain="integrated(rules=guided, multiply_by_inputs=False)", trained_as="integrated"),
        },
        "guided",
        "one step",
        (
            ("test", "accuracy()"),
            ("test[:500]", _DELETION),
            ("test[:500]", _DELETION_BLUR),
            ("test[:500]", _DELETION_BLACK),
        ),
        (
            # The mean colour is the baseline of integrated gradients too, which favours it: so three substrates.
            Claim(f"test[:500] | {_DELETION} | deletion", "deletion score, mean colour", -1),
            Claim(f"test[:500] | {_DELETION_BLUR} | deletion", "deletion score, blur", -1),
            Claim(f"test[:500] | {_DELETION_BLACK} | deletion", "deletion score, black", -1),
        ),
    ),
}


def arm_experiment(system: System, arm: Arm, seed: int) -> setup.Experiment:
    return setup.experiment(ROOT / "configs" / system.config, [("seed", str(seed)), *arm.overrides])


def run(name: str, arm_name: str, seed: int, runs: Path) -> dict:
    """Train (or continue, or reuse) and evaluate one arm: {"measures": {"split | evaluator | name": value}, costs}."""
    system = SYSTEMS[name]
    arm = system.arms[arm_name]
    workdir = runs / f"{name}_{arm.trained_as or arm_name}_seed{seed}".replace(" ", "_")
    experiment = arm_experiment(system, arm, seed)
    # Returns at once where the run is complete, and refuses a folder that another config has made.
    fit(experiment.config, workdir, parts=setup.parts(experiment), file=ROOT / "configs" / system.config)
    before = cpu_seconds()
    loaded = setup.restored(experiment, workdir, "last")
    measures = {}
    for split, evaluator in system.evaluators:
        split = experiment.config.train if split == "train" else split
        shown = "train" if split == experiment.config.train else split
        rows = setup.evaluate(loaded, splits=split, evaluators=evaluator.replace("EXPLAIN", arm.explain))
        measures |= {f"{shown} | {evaluator} | {key}": value for key, value in rows[0]["values"].items()}
    train = f"train | {ACCURACY.split(' | ', 1)[1]}"
    if train in measures:
        measures["generalisation gap"] = measures[train] - measures[ACCURACY]
    _, meta = checkpoint.restore(workdir, "last", {})
    costs = {"train_cpu_seconds": meta["cpu_seconds"], "evaluate_cpu_seconds": cpu_seconds() - before}
    return {"measures": measures, "steps": meta["step"], **costs, "what": what(name, arm_name), **provenance()}


def what(name: str, arm_name: str) -> dict:
    """What a result depends on, so that a stored one is not taken for another's."""
    system, (overrides, explain, trained_as) = SYSTEMS[name], SYSTEMS[name].arms[arm_name]
    text = (ROOT / "configs" / system.config).read_text(encoding="utf-8")
    return {
        "config": f"configs/{system.config}",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "overrides": [list(pair) for pair in overrides],
        "explain": explain,
        "trained_as": trained_as,
        "evaluators": [list(pair) for pair in system.evaluators],
    }


def compare(runs: dict) -> dict:
    """Per system and measure: every arm's values over seeds, the paired differences of the method, and the verdicts."""
    table = {}
    for name, system in SYSTEMS.items():
        seeds = [s for s in map(str, SEEDS) if all(s in runs.get(name, {}).get(arm, {}) for arm in system.arms)]
        if len(seeds) < 2:
            continue
        found = runs[name]
        measures = {}
        for measure in found[system.method][seeds[0]]["measures"]:
            values = {arm: [found[arm][seed]["measures"].get(measure) for seed in seeds] for arm in system.arms}
            if any(not isinstance(value, int | float) for column in values.values() for value in column):
                continue
            row = {
                arm: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)), "values": v}
                for arm, v in values.items()
            }
            for other in system.arms:
                if other != system.method:
                    row[f"{system.method} - {other}"] = paired(values[system.method], values[other])
            measures[measure] = row
        control = next(iter(system.arms))
        claims = [
            {"claim": claim.words, "measure": claim.measure, "verdict": judge(measures.get(claim.measure), system, claim, control)}
            for claim in system.claims
        ]  # fmt: skip
        table[name] = {"seeds": len(seeds), "claims": claims, "measures": measures}
    return table


def judge(row: dict | None, system: System, claim: Claim, control: str) -> str:
    """From the differences to the plain control and to the one that decides; "undefined" where a run has no such number."""
    if row is None:
        return "undefined"
    sides = {"higher": 1, "lower": -1, "undecided": 0}
    found = [claim.sign * sides[row[f"{system.method} - {other}"]["verdict"]] for other in (control, system.decides)]
    if all(side > 0 for side in found):
        return "reproduced"
    return "not reproduced" if any(side < 0 for side in found) else "undecided"


def markdown(result: dict) -> str:
    """README's table of systems."""
    lines = [
        "| system | turned on by | the paper claims | measured here: method; minus plain; minus the control that decides "
        "| accuracy: plain, method, deciding control | verdict |",
        "|---|---|---|---|---|---|",
        topgap_row(),
    ]
    for name, system in SYSTEMS.items():
        compared = result["comparison"].get(name)
        if compared is None:
            continue
        control = next(iter(system.arms))
        cells, verdicts = [], []
        for claim, judged in zip(system.claims, compared["claims"]):
            verdicts.append(f"{claim.words}: **{judged['verdict']}**")
            if judged["verdict"] == "undefined":
                continue
            row = compared["measures"][claim.measure]
            differences = "; ".join(interval(row[f"{system.method} - {other}"]) for other in (control, system.decides))
            cells.append(f"{claim.words} {row[system.method]['mean']:.3f}; {differences}")
        accuracy = compared["measures"][ACCURACY]
        shown = (control, system.method, system.decides)
        each = ", ".join(f"{accuracy[arm]['mean']:.3f} ± {accuracy[arm]['std']:.3f}" for arm in shown)
        paper = system.paper if " " in system.paper else f"[{system.paper}](https://arxiv.org/abs/{system.paper})"
        lines.append(
            f"| {system.title} ({paper}) | {system.turned_on} | {system.claimed} | {'<br>'.join(cells)} "
            f"(decides: {system.decides}) | {each} | {'<br>'.join(verdicts)} |"
        )
    return "\n".join(lines)


def interval(change: dict) -> str:
    text = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
    return text if change["verdict"] == "undecided" else f"**{text}**"


def topgap_row() -> str:
    """Top-GAP at the objects' mean share, five seeds, from results/shapes.json; its control is the same head with gap()."""
    stored = json.loads((ROOT / "results" / "shapes.json").read_text())["comparison"]
    shifted, iou = stored["test_shifted"]["accuracy.accuracy"], stored["test"]["localisation.iou"]
    test, arm = stored["test"]["accuracy.accuracy"], "top_gap .14"
    verdicts = {"higher": "reproduced", "lower": "not reproduced", "undecided": "undecided"}
    cells = [
        f"{words} {row[arm]['mean']:.3f}; {interval(row[f'{arm} - gap'])}"
        for words, row in (("accuracy under shift", shifted), ("IoU of the class map", iou))
    ]
    judged = "<br>".join(
        f"{words}: **{verdicts[row[f'{arm} - gap']['verdict']]}**"
        for words, row in (("accuracy", shifted), ("IoU", iou))
    )
    both = ", ".join(f"{test[a]['mean']:.3f} ± {test[a]['std']:.3f}" for a in ("gap", arm))
    return (
        "| Top-GAP ([2409.04819](https://arxiv.org/abs/2409.04819)) | `top_gap(fraction=.14)` | accuracy and better localisation "
        f"| {'<br>'.join(cells)} (decides: the plain control, which has the same head) | {both} | {judged} |"
    )


def topgap_arms(runs: Path) -> tuple[str, str, list]:
    """Top-GAP's arms are runs of shapes.py, beside these."""
    stored, arms = json.loads((ROOT / "results" / "shapes.json").read_text())["runs"], []
    for arm in ("gap", "top_gap .14"):
        experiment = setup.experiment(shapes.CONFIG, [("seed", "0"), ("pool", shapes.ARMS[arm])])
        loaded = setup.restored(experiment, runs.parent / "shapes" / f"{arm.replace(' ', '_')}_seed0", "last")
        arms.append((arm, loaded, "cam()", stored[arm]["0"]["measures"]["test"]["accuracy.accuracy"]))
    return "Top-GAP", "accuracy and better localisation", arms


def system_arms(name: str, runs: Path) -> tuple[str, str, list]:
    """Title, claim and arms of a system; an arm is (name, model, explanation, accuracy)."""
    system, stored, arms = SYSTEMS[name], json.loads(RESULTS.read_text())["runs"][name], []
    for arm_name, arm in system.arms.items():
        workdir = runs / f"{name}_{arm.trained_as or arm_name}_seed0".replace(" ", "_")
        loaded = setup.restored(arm_experiment(system, arm, 0), workdir, "last")
        arms.append((arm_name, loaded, PICTURES[name] or arm.explain, stored[arm_name]["0"]["measures"][ACCURACY]))
    return system.title, system.claimed, arms


PICTURES = {
    "sgdrop": "grad_cam('stage3')",
    "norm_regularised": "gradient(reduce='abs_sum')",
    "art": "gradient(reduce='abs_sum')",
    "guided": None,  # an arm's own explanation
}


def page(runs: Path, count: int = 6) -> Path:
    """One HTML page: for each system the same pictures, with the map of every arm beside the control's (seed 0)."""
    parts = []
    for title, words, arms in (topgap_arms(runs), *(system_arms(name, runs) for name in SYSTEMS)):
        maps, accuracy = {}, []
        for arm, loaded, method, right in arms:
            shown = setup.explain(loaded, methods=method, count=count)
            maps[arm] = next(iter(shown.maps.values()))
            accuracy.append(f"{arm} {right:.3f}")
        truth = [(true, "") for true, _ in shown.names]
        picture = runs / "pictures" / f"{title}.png".replace(" ", "_")
        sheets.sheet(picture, shown.images, names=truth, maps=maps, title=title)
        methods = ", ".join(f"{arm} {method}" for arm, _, method, _ in arms)
        parts.append(
            f"<h2>{html.escape(title)}</h2><p>The paper claims {html.escape(words)}. Accuracy of each arm on test, seed 0: "
            f"{html.escape(', '.join(accuracy))}. Maps: {html.escape(methods)}.</p><img alt='{html.escape(title)}' "
            f"src='data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}'>"
        )
    style = "body{font:16px/1.5 system-ui;margin:2rem auto;max-width:72rem;padding:0 1rem}img{max-width:100%}"
    out = runs / "systems.html"
    write_text(
        out,
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Systems "
        f"beside their controls</title><style>{style}</style><h1>Systems beside their controls</h1>{''.join(parts)}</html>\n",
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/study/systems"))
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="print the stored results as a table for the README")
    parser.add_argument("--page", action="store_true", help="write the page of pictures")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(RESULTS.read_text())))
        return
    print(configure_cpu(), file=sys.stderr)
    if arguments.page:
        print(page(arguments.runs))
        return
    for seed in arguments.seeds:
        for name in arguments.systems:
            for arm in SYSTEMS[name].arms:
                stored = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
                if stored.get(name, {}).get(arm, {}).get(str(seed), {}).get("what") == what(name, arm):
                    continue
                found = run(name, arm, seed, arguments.runs)
                # Read again: another process may have written its own runs meanwhile.
                stored = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
                stored.setdefault(name, {}).setdefault(arm, {})[str(seed)] = found
                result = {"command": "experiments/systems.py", "comparison": compare(stored), "runs": stored}
                RESULTS.parent.mkdir(exist_ok=True)
                write_text(RESULTS, json.dumps(result, indent=1) + "\n")
                print(f"{name}, {arm}, seed {seed}: accuracy {found['measures'][ACCURACY]:.3f}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
