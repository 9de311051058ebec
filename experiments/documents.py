"""docs/results.md from results/*.json: every table of the README and the documents, each with the script and the file
behind it."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_attacks
import bench_checkpoint
import bench_explain
import bench_fit
import bench_loops
import bench_networks
import bench_pool
import bench_records
import bench_systems
import parity_attacks
import parity_square
import planted_fakes
import pool_surrogates
import resnet4b
import study as driver
from _bench_driver import table as markdown
from _studies import STUDIES, SYSTEMS

from topgap_jax.measure import results

ROOT = Path(__file__).parent.parent
DOCS, RELIABILITY = ROOT / "docs" / "results.md", ROOT / "docs" / "reliability.md"
INTRODUCTION = """\
# Results

Written by `make results` from `results/*.json`; nothing is trained for it. Each table says which script made its file.

A row of a study gives the mean of the plain control over its seeds ± the sample's standard deviation, and of every
other arm its mean and its difference from the control, paired by seed, with a 95 % t interval: bold where the
interval leaves out 0, otherwise undecided. No interval is corrected for the number of rows. Within a study all arms
have the same network, data, steps and seeds. Where no audit stands beside them, robust numbers are PGD-20 with one
start, not audited: upper bounds. Nothing here is a paper's own training budget."""
SYSTEMS_TEXT = """\
A claim is "reproduced" only where the method differs on the claimed side from plain training *and* from the control
that decides, "not reproduced" where it lies on the other side of one of them, else "undecided": the commonest verdict
of three seeds."""
MODELS_TEXT = """\
CIFAR-10, the first test images. One JSON a model in the form of RobustBench, of which `topgap verify FILE` measures 256
images again. "Reported" is the authors' own number, of another attack."""
ROBUSTNESS_TEXT = """\
The claim (arXiv 2409.04819): over 50 % of CIFAR-10 under PGD-20 at 8/255, at an unchanged clean accuracy. ResNet-20 of
`configs/cifar10.py` with either pool, its weights as `results/weights` keeps them: % of 10,000 test images that are
right, of 1,000 that PGD-20 leaves at each radius in linf, of 250 that AutoAttack leaves, with 95 % intervals over
images; and the audit at 8/255 of 128 images. "Over 50 %" is judged by that interval, in every seed."""
ONE_SEED = "One seed: every difference is undecided."


def write() -> None:
    """Write docs/results.md, and print which script and which file are behind each of its tables."""
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(text(), encoding="utf-8")
    RELIABILITY.write_text(reliability(), encoding="utf-8")
    for title, command, file, _ in sections():
        print(f"{title:60}  {file:34}  {command}")
    print(f"written: {DOCS.relative_to(ROOT)}")


def text() -> str:
    """docs/results.md."""
    parts = [INTRODUCTION]
    for title, command, file, body in sections():
        parts.append(f"## {title}\n\n{body}\n\nFrom `{command}`: [{file}](../{file}).")
    return "\n\n".join(parts) + "\n"


def reliability() -> str:
    """docs/reliability.md, whose prose is written by hand, with the tables of today's results."""
    text = RELIABILITY.read_text(encoding="utf-8")
    for name, body in (("faults", faults), ("fuzz_readers", fuzzed)):
        begin, end = f"<!-- table of results/{name}.json: make results -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        stored = read(name)
        table = f"{body(stored)}\n\nFrom `{command(stored)}`. {hardware([stored])}"
        text = f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def sections() -> list[tuple[str, str, str, str]]:
    """(title, command, file, Markdown) of each table."""
    stored = [name for name in STUDIES if (ROOT / "results" / f"{name}.json").is_file()]
    robust = [name for name in stored if STUDIES[name].keeps]
    found = [systems(), *(study(name) for name in stored if name not in robust), *robustness(robust), *models()]
    for title, name, body in BENCHMARKS:
        if not (ROOT / "results" / f"{name}.json").is_file():
            continue
        stored = read(name)
        found.append((title, command(stored), f"results/{name}.json", f"{body(stored)}\n\n{machine(stored)}"))
    return found


def command(stored: Mapping[str, Any]) -> str:
    """How the file was made, from the root of the repository."""
    script, _, rest = stored["command"].removeprefix("python ").partition(" ")
    return f"python experiments/{Path(script).name} {rest}".rstrip()


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def systems() -> tuple[str, str, str, str]:
    names = ["shapes", *SYSTEMS]
    table = driver.systems_table(names, {name: read(name)["comparison"] for name in names})
    return (
        "The five systems, each beside its controls",
        "python experiments/study.py shapes systems",
        "results/",
        f"{SYSTEMS_TEXT}\n\n{table}",
    )


def study(name: str) -> tuple[str, str, str, str]:
    entry, stored = STUDIES[name], read(name)
    title = f"{entry.title} on `{Path(stored['config']).stem}`" if not entry.claims or name == "shapes" else entry.title
    runs = [run for seeds in stored["runs"].values() for run in seeds.values()]
    arms = "; ".join(
        f"`{arm}`: {', '.join(f'`{key} = {value}`' for key, value in settings.items()) or 'as the config stands'}"
        for arm, settings in ((arm, settings_of(seeds)) for arm, seeds in stored["runs"].items())
    )
    number = min(map(len, stored["runs"].values()))
    count = ONE_SEED if number == 1 else f"{number} seeds, {runs[0]['steps']} steps."
    minutes = {
        arm: statistics.median(run["train_cpu_seconds"] for run in seeds.values()) / 60
        for arm, seeds in stored["runs"].items()
        if not entry.arms[arm].trained_as
    }
    cost = ", ".join(f"{arm} {value:.1f}" for arm, value in minutes.items())
    body = (
        f"{count} Arms of `{stored['config']}`: {arms}. CPU minutes of a training: {cost}.\n\n"
        f"{driver.table(entry, stored['comparison'])}\n\n{hardware(runs)}"
    )
    return title, f"python experiments/study.py {name}", f"results/{name}.json", body


def robustness(names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """The claim of Top-GAP's robustness: every network with its intervals, and the verdicts; [] where none is made."""
    lines, verdicts, runs = [], [], []
    for name in names:
        study, stored = STUDIES[name], read(name)
        verdicts += [f"- `{study.method}`, {claim['claim']}: **{claim['verdict']}**." for claim in stored["claims"]]
        for arm, seed, run in ((arm, *pair) for arm, seeds in stored["runs"].items() for pair in seeds.items()):
            runs.append(run)
            accuracy, curve, attacked, audit = map(results.from_json, run["rows"])
            measures = [accuracy.measures["accuracy"], *(curve.measures[f"accuracy_at_{i}"] for i in range(1, 5))]
            measures.append(attacked.measures["robust_accuracy"])
            of = lambda status, audit=audit: ", ".join(c.id for c in audit.checks if c.status == status) or "none"
            cells = [f"{100 * m.value:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]" for m in measures]
            lines.append([f"`{arm}`", seed, *cells, f"{of('fail')}; {of('warn')}"])
    if not lines:
        return []
    head = [
        "arm",
        "seed",
        "clean, %",
        *(f"PGD-20, {i}/255" for i in (1, 2, 4, 8)),
        "AutoAttack, 8/255",
        "audit: failed; warned",
    ]
    body = f"{ROBUSTNESS_TEXT}\n\n{markdown(head, lines)}\n\n" + "\n".join(verdicts) + f"\n\n{hardware(runs)}"
    made = f"python experiments/study.py {' '.join(names)}"
    return [("Top-GAP's robustness", made, "results/", body)]


def models() -> list[tuple[str, str, str, str]]:
    """The models' files, [] where there are none."""
    lines = []
    for path in sorted((ROOT / "results" / "models").glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        (row,) = (row for row in stored["rows"] if "robust_accuracy" in row["measures"])
        robust = row["measures"]["robust_accuracy"]
        low, high = (f"{100 * robust[key]:.2f}" for key in ("low", "high"))
        cells = [f"[{path.stem}](../results/models/{path.name})", stored["architecture"], stored["eps"], robust["n"]]
        cells += [stored["clean_acc"], f"{stored['autoattack_acc']} [{low}, {high}]", stored["reported"] or ""]
        lines.append([*map(str, cells), row["audit"]])
    if not lines:
        return []
    head = ["model", "network", "linf", "images", "clean, %", "AutoAttack, % [95 %]", "reported, %", "audit"]
    body = f"{MODELS_TEXT}\n\n{markdown(head, lines)}"
    return [("Published networks under AutoAttack", "python experiments/models.py", "results/models/", body)]


def settings_of(seeds: Mapping[str, Any]) -> dict[str, str]:
    """What an arm sets."""
    run = next(iter(seeds.values()))
    return {**run["overrides"], **({"explanation": run["explain"]} if run["explain"] else {})}


def hardware(runs: Sequence[Mapping[str, Any]]) -> str:
    """With what the runs were made, as one sentence."""
    each = lambda value: ", ".join(dict.fromkeys(map(value, runs)))
    return (
        f"Commit {each(lambda run: run['commit'])}; {each(lambda run: run['processor'])}, "
        f"{each(lambda run: str(run['cores']))} cores; JAX {each(lambda run: run['versions']['jax'])}, "
        f"Python {each(lambda run: run['versions']['python'])}."
    )


def machine(stored: Mapping[str, Any]) -> str:
    """The same of a benchmark."""
    if "machine" not in stored:
        return hardware([stored])
    about = stored["machine"]
    return f"Commit {about['commit']}; {about['processor']}, {about['cores']} cores; Python {about['python']}."


def pretrained(stored: Mapping[str, Any]) -> str:
    lines = []
    for name, network in stored["networks"].items():
        accuracy = network["row"]["measures"]["accuracy"]
        error, low, high = (100 * (1 - accuracy[key]) for key in ("value", "high", "low"))
        lines.append(
            [
                f"`{name}`",
                f"{accuracy['n']:,}",
                f"{error:.2f} [{low:.2f}, {high:.2f}]",
                f"{network['published_error']:.2f}",
            ]
        )
    table = markdown(["weights", "images", "error, % [95 %]", "published, or PyTorch's, %"], lines)
    if "columns" not in stored:
        return table
    own = {name: 100 * stored["columns"][name] for name in ("value", "low", "high")}
    return (
        f"{table}\n\nEfficientNet-Lite0 as it is on `tiny_imagenet20`, enlarged to 128, with its own 20 columns: "
        f"accuracy {own['value']:.1f} [{own['low']:.1f}, {own['high']:.1f}] % of {stored['columns']['n']:,}."
    )


def core(stored: Mapping[str, Any]) -> str:
    names = ("oneDNN", "oneDNN, 2 devices", "XLA", "plain JAX", "torch.compile")
    lines = []
    for path, row in stored["paths"].items():
        ratios = [row["ratio"][name] for name in names]
        ms = [row["settings"][name]["median_ms"] for name in (row["peer"], "oneDNN")]
        cells = [f"{ratio['median']:.2f} [{ratio['range'][0]:.2f}-{ratio['range'][1]:.2f}]" for ratio in ratios]
        lines.append([path, *cells, f"{ms[0]:.0f} / {ms[1]:.0f}"])
    return (
        "PyTorch's time over ours (above 1 ours is faster), medians of 7 interleaved rounds [range]; ResNet-20 unless "
        "said, batch 128, float32. \"XLA\" is the engine without oneDNN; PyTorch is channels-last, with the better of "
        "two thread settings.\n\n"
    ) + markdown(["path", *names, "PyTorch / oneDNN, ms"], lines)  # fmt: skip


def memory(stored: Mapping[str, Any]) -> str:
    names = ("oneDNN", "XLA", "plain JAX")
    lines = [
        [path, *(f"{row['settings'][name]['peak_mb']:.0f}" for name in (*names, row["peer"]))]
        for path, row in stored["paths"].items()
    ]
    return "Largest resident memory of one process each, MB.\n\n" + markdown(["path", *names, "PyTorch"], lines)


def networks(stored: Mapping[str, Any]) -> str:
    return (
        f"PyTorch's time over ours, median [range] of the rounds; of CPU time. Batch {stored['batch']} at"
        f" {stored['size']}x{stored['size']}, float32, the engine with oneDNN and without. Peak: the whole process,"
        f" compilation included.\n\n{bench_networks.table(stored['rows'])}"
    )


def loops(stored: Mapping[str, Any]) -> str:
    head = ["path", "loop / unrolled, median [range]", "of minima", "of CPU time", "a step, ms", "compile s"]
    return "PGD-10 of a ResNet-20 in a loop, and written out.\n\n" + markdown(
        head, [bench_loops.line(name, row) for name, row in stored["paths"].items()]
    )


def fit(stored: Mapping[str, Any]) -> str:
    lines = [bench_fit.line(name, row) for name, row in stored["settings"].items()]
    return "A training by `fit` beside the jitted step it calls.\n\n" + markdown(bench_fit.HEAD, lines)


def checkpoints(stored: Mapping[str, Any]) -> str:
    lines = [bench_checkpoint.line(name, row) for name, row in stored["sizes"].items()]
    return "Writing a checkpoint's manifest, and comparing it.\n\n" + markdown(bench_checkpoint.HEAD, lines)


def pool(stored: Mapping[str, Any]) -> str:
    head = ["maps", "top_gap / gap, median [range]", "of minima", "of CPU time", "limit", "gap ms", "top_gap ms"]
    steps = markdown(head, [bench_pool.step_line(maps, row) for maps, row in stored["steps"].items()])
    ways = markdown(
        ["ms, median / minimum", *(f"{tuple(shape['maps'])}, k = {shape['k']}" for shape in stored["shapes"])],
        [[way, *(f"{r['median_ms']:.1f} / {r['min_ms']:.1f}" for r in rows)] for way, rows in stored["ways"].items()],
    )
    return (
        f"A training step with `top_gap` over the same step with `gap`.\n\n{steps}\n\nForward and backward of one"
        f" pooling.\n\n{ways}"
    )


def steps(stored: Mapping[str, Any]) -> str:
    head = ["system", "system / plain, median [range]", "of minima", "of CPU time", "limit", "plain ms", "system ms"]
    return "A training step of each system over the plain step of the same network.\n\n" + markdown(
        head, [bench_systems.line(name, row) for name, row in stored["systems"].items()]
    )


def forms(stored: Mapping[str, Any]) -> str:
    head = ["batch", "size", "in", "out", "stride", "kind", "lax ms", "ours ms", "lax / ours"]
    lines = [
        [*map(str, row["layer"]), row["kind"], *(f"{row[key]:.2f}" for key in ("lax_ms", "ours_ms", "ratio"))]
        for row in stored["rows"]
    ]
    return "Convolutions of the engine without oneDNN, beside lax's own.\n\n" + markdown(head, lines)


def parity(stored: Mapping[str, Any]) -> str:
    networks: dict[str, list[tuple[str, Any]]] = {}
    for key, row in stored["logits"].items():
        name, size = key.rsplit(" ", 1)
        networks.setdefault(name, []).append((size, row))
    text = lambda model: model.replace(", classes=classes, mean=mean, std=std", "")
    lines = [
        [name, f"`{text(rows[0][1]['model'])}`", ", ".join(f"{row['difference']:.1e} ({size})" for size, row in rows)]
        for name, rows in networks.items()
    ]
    return (
        "Largest difference of the logits from the publisher's, over the largest logit: random weights and statistics,"
        " in files by the publisher's names. Those of Hugging Face, efficientnet_pytorch and old torchvision are timm's"
        " and torchvision's networks with the tensors renamed.\n\n"
    ) + markdown(["network", "model", "difference (image)"], lines)


def explained(stored: Mapping[str, Any]) -> str:
    def line(name, row):
        loose = row.get("loose")
        more = (
            f"; {loose['images']} above {stored['limit']:g}, in float64 {loose['worst_in_float64']:.0e}"
            if loose
            else ""
        )
        parts = ", ".join(f"{key} {value:.0e}" for key, value in row["measures"].items())
        return [
            name,
            row["package"],
            str(row["images"]),
            f"{row['median']:.0e}, {row['worst']:.0e}{more}",
            parts or row["note"],
        ]

    return (
        "Largest difference over the range of the package's map, median and worst over the images, float32. A single"
        " map is off by more where rounding turns a ReLU: it is computed once more in float64. What the last column"
        " says is a difference of definition that the script takes away.\n\n"
    ) + markdown(
        ["network, method", "package", "images", "median, worst", ""], [line(*row) for row in stored["rows"].items()]
    )


def explaining(stored: Mapping[str, Any]) -> str:
    head = [
        "network, method",
        "package / ours, median [range]; CPU time",
        "eight calls of ours",
        "package / ours",
        "",
        "peak",
        "",
    ]
    return (
        f"captum, pytorch-grad-cam and openerf's loop beside ours: ResNet-20 at batch 128, EfficientNet-Lite0 at batch"
        f" 8; integrated gradients with {stored['steps']} steps.\n\n"
    ) + markdown(head, [bench_explain.line(*row) for row in stored["rows"].items()])


def explaining_ideas(stored: Mapping[str, Any]) -> str:
    head = ["", "", "as it is / this, median [range]; CPU time", "time", "CPU time"]
    parts = stored["parts"].items()
    lines = [[name, *bench_explain.idea_cells(*row)] for name, part in parts for row in part["rows"].items()]
    return (
        "Of those that miss their target. Masks are no part of the gradient, nor of the field: that idea is noise"
        " there.\n\n"
    ) + markdown(head, lines)


def claims_of_maps(stored: Mapping[str, Any]) -> str:
    of = lambda three: f"{three[0]:.3f} [{three[1]:.3f}, {three[2]:.3f}]"
    names = {"deletion": "deletion, mean colour", "deletion_2": "deletion, blur", "insertion": "insertion"}

    def cell(measured):
        if "ours_minus_this" not in measured:
            return of(measured["mean"])
        mean, low, high = measured["ours_minus_this"]
        text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"{measured['mean'][0]:.3f}; {f'**{text}**' if low > 0 or high < 0 else text}"

    parts = [
        "Means with 95 % bootstrap intervals over the images; behind the semicolon guided non-linearity minus this"
        " method, paired, bold where the interval leaves out 0. Deletion: lower is better; insertion: higher is. Each"
        " method was measured at the commit that the file has beside it.",
        claim_of_deletion(stored["networks"]),
    ]
    for network, methods in stored["networks"].items():
        lines = [[f"`{name}`", *(cell(each[key]) for key in names)] for name, each in methods.items()]
        parts.append(f"{network}, {stored['images'][network]}:\n\n" + markdown(["", *names.values()], lines))
    return "\n\n".join(parts)


def claim_of_deletion(networks: Mapping[str, Any]) -> str:
    """Where guided non-linearity has the lower deletion, as the paper claims it of every rival."""
    wins: dict[str, list[bool]] = {}
    sides: Counter[str] = Counter()
    for network, methods in networks.items():
        for each in methods.values():
            for name in ("deletion", "deletion_2"):
                if "ours_minus_this" in each[name]:
                    _, low, high = each[name]["ours_minus_this"]
                    sides["lower" if high < 0 else "higher" if low > 0 else "undecided"] += 1
                    wins.setdefault(network, []).append(high < 0)
    everywhere = [network for network, each in wins.items() if all(each)]
    return (
        f"The paper claims a lower deletion than any rival's. Of {sides.total()} differences of deletion"
        f" {sides['lower']} are below 0, {sides['higher']} above, {sides['undecided']} undecided; all of a network are"
        f" below 0 on {', '.join(everywhere) or 'none'}."
    )


def claims_of_places(stored: Mapping[str, Any]) -> str:
    of = lambda three, sign="": "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*three, s=sign)
    names = {
        "max_box_accuracy": "MaxBoxAcc", "max_box_accuracy_v2": "MaxBoxAccV2", "best_iou": "IoU at its best tau",
        "pxap": "PxAP",
    }  # fmt: skip

    def cell(measured):
        if measured is None:
            return ""
        if "native_minus_this" not in measured:
            return of(measured["mean"])
        against = measured["native_minus_this"]
        text = of(against, "+")
        return f"{measured['mean'][0]:.3f}; {f'**{text}**' if against[1] > 0 or against[2] < 0 else text}"

    parts = [
        "Maps of the true class; thresholds are the best on these very pictures, for every method. 95 % bootstrap"
        " intervals over the pictures; behind the semicolon the head's class map, `cam()`, minus this method on the"
        " same network, paired, bold where the interval leaves out 0. Each resample has best thresholds of its own: an"
        " interval that only just leaves out 0 says little. One training a network (seed 0)."
    ]
    for network, each in stored["networks"].items():
        lines = [[f"`{name}`", *(cell(one.get(key)) for key in names)] for name, one in each["methods"].items()]
        for box, values in each["baselines"].items():
            words = {"centre": "centre box", "full": "full image"}[box]
            lines.append([words, *(f"{values[key]:.3f}" if key in values else "" for key in names)])
        head = markdown(["", *names.values()], lines)
        parts.append(f"{network}, {each['pictures']} pictures of {each['split']}:\n\n{head}")
    return "\n\n".join(parts)


def claims_of_trust(stored: Mapping[str, Any]) -> str:
    lines = []
    for network, methods in stored["networks"].items():
        for name, each in methods.items():
            of = lambda status, each=each: ", ".join(one["id"] for one in each["checks"] if one["status"] == status)
            said = "the network" if each["said_to_show_the_network"] else "the image"
            cells = [said, of("pass"), of("fail"), ", ".join(filter(None, (of("warn"), of("skipped"))))]
            lines.append([network, f"`{name}`", *cells])
    head = ["network", "method", "said to show", "passes", "fails", "undecided or skipped"]
    checks = (
        "T1 parameters drawn anew, T2 another class, T3 rivals, T4 a wall, T5 three substrates, T6 the image mirrored."
    )
    return f"{checks}\n\n" + markdown(head, lines)


def explaining_memory(stored: Mapping[str, Any]) -> str:
    cell = lambda one: ", ".join(f"{one[key]:.1f}" for key in ("planned_mb", "peak_mb") if key in one)
    lines = [[name, *(f"{one['what']}: {cell(one)}" for one in pair)] for name, pair in stored["rows"].items()]
    return "MB planned by XLA; peak of a process, where it ran.\n\n" + markdown(["", "few", "many"], lines)


def foreign(stored: Mapping[str, Any]) -> str:
    columns = ("apply", "fast_convs", "with_rules", "grad_cam", "with_pool", "with_drop", "twenty_steps")
    lines, said = [], []
    for name, row in stored["networks"].items():
        cells = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, str):
                said.append(f"- {name}, `{column}`: {value.partition('; layers:')[0]}")
            cells.append(f"{value:.0e}" if isinstance(value, float) else "says why not" if value else "")
        if "float64" in row:
            plain, fast = (f"{row['float64'][key]:.0e}" for key in ("plain", "fast_convs"))
            said.append(f"- {name}, `fast_convs`: {fast} from float64, plain float32 {plain} (a ReLU at 0 switches)")
        lines.append([name, str(row["layers"]), str(sum(row["operations"].values())), *cells])
    head = ["network", "layers", "operations", *columns[:-1], "20 steps"]
    text = (
        "Flax networks that other people published, with random weights, at 64 pixels, some with fewer blocks: largest"
        " difference from plain Flax (`module.apply`, `jax.grad`), over the largest value. `apply`, `fast_convs`,"
        " `with_rules` (the ordinary rule of every operation; `operations`: how often one is used, twice in a ReLU6):"
        " logits and input gradient; `grad_cam` against the formula by Flax's interceptors; `with_pool(gap())` against"
        " the logits; `with_drop(dropout(0))`: the gradient of a training step; 20 steps of gradient descent: weights"
        " and statistics.\n\n"
    )
    sources = f"\n\nFrom {', '.join(stored['sources'])}."
    return text + markdown(head, lines) + ("\n\n" + "\n".join(said) if said else "") + sources


def done(rows: Mapping[str, Mapping[str, Any]], number: int) -> str:
    """How many rows there are of those that the script makes, and of which commits: they are stored as they come."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    return f"{len(rows)} of {number} rows, of {commits}."


def attacked(stored: Mapping[str, Any]) -> str:
    head = ["network, ball, attack", "eps", "images", "ours", "the packages", ""]
    return (
        "Images that are left, of the first test images: ours may leave .5 points more at 1,000 images, one image more"
        f" below. {done(stored['rows'], len(parity_attacks.ROWS))}\n\n"
    ) + markdown(head, [parity_attacks.cells(*row) for row in stored["rows"].items()])


def searching(stored: Mapping[str, Any]) -> str:
    head = ["norm", "eps", "ours: images left; mean margin", "auto-attack", "difference of the margins [95 %]"]
    return (
        f"Square of both, {stored['queries']} candidates, {stored['seeds']} seeds, the same images"
        f" (`{stored['split']}`): images left by each seed, and the mean margin of the best images, 0 where they are"
        " misclassified. Above 0 ours is the weaker search."
        f" {done(stored['rows'], len(parity_square.BALLS))}\n\n"
    ) + markdown(head, [parity_square.cells(*row) for row in stored["rows"].items()])


def attacking(stored: Mapping[str, Any]) -> str:
    head = ["whole attacks of a split", "package / ours, median [range]", "at least", "seconds", "robust", "gradients"]
    alone = {name: row for name, row in stored["rows"].items() if "ratio" not in row}
    beside = [[name, *bench_attacks.cells(row)] for name, row in stored["rows"].items() if name not in alone]
    lines = [[name, f"{row['median_seconds']:.1f}", f"{row['peak_mb']:.0f}"] for name, row in alone.items()]
    by_images = (
        f"\n\nPGD-20 at .75/255 alone:\n\n{markdown(['', 'seconds', 'peak memory, MB'], lines)}" if lines else ""
    )
    return (
        "ResNet-20, test images of CIFAR-10; gradients: the share of those of an attack that never stops early."
        f" {done(stored['rows'], len(bench_attacks.ROWS) + len(bench_attacks.IMAGES))}\n\n"
        f"{markdown(head, beside)}{by_images}"
    )


def defended(stored: Mapping[str, Any]) -> str:
    lines = []
    for row in stored["rows"]:
        clean, *after = resnet4b.cells(row)
        seconds = f"{row['cost']['seconds']:.0f}"
        lines.append([f"`{row['evaluator']}`", row["split"], clean, ", ".join(after), seconds])
    last = stored["rows"][-1]["measures"]
    value = lambda name: 100 * last[name]["value"]
    black_box = value(f"after_{resnet4b.WHITE_BOX}") - value("robust_accuracy")
    head = ["evaluator", "images", "clean", "after each attack", "seconds"]
    return (
        "`resnet4b_adv2_cifar10`, of which its authors report 61.41 % under PGD at 2/255. Square and transfer break"
        f" {black_box:.2f} % of all images beyond the white-box attacks.\n\n"
    ) + markdown(head, lines)


def mistaken(stored: Mapping[str, Any]) -> str:
    lines = [[name, "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row)] for name, row in stored["rows"].items()]
    return (
        f"PGD-20 at 8/255 on a ResNet-20 without a defence, {stored['images']} test images of CIFAR-10: right, and with"
        " one mistake at a time. A textbook cross-entropy is -log softmax(z)_y; scaled logits leave it a gradient of"
        " rounding noise, and ours none.\n\n"
    ) + markdown(["evaluation", "robust accuracy [95 %]"], lines)


def surrogates(stored: Mapping[str, Any]) -> str:
    return (
        f"`results/weights/{stored['weights']}.safetensors` at 8/255 on `{stored['split']}`: APGD on cross-entropy and"
        " on DLR, through the network with another pool on the backward pass alone.\n\n"
    ) + markdown(pool_surrogates.HEAD, [pool_surrogates.cells(stored, name) for name in stored["rows"]])


def planted(stored: Mapping[str, Any]) -> str:
    lines = []
    for name, row in stored["networks"].items():
        of = lambda status, row=row: ", ".join(check["id"] for check in row["checks"] if check["status"] == status)
        due = " or ".join(row["due"]) or "none"
        cells = [due, of("fail") or "none", of("warn") or "none", planted_fakes.verdict(row)]
        lines.append([name, f"{row['eps']}", *cells, f"{row['cpu_seconds'] / 60:.0f}"])
    head = ["network", "linf", "must fail", "failed", "warned", "verdict", "CPU minutes"]
    return (
        f"Audits (`audit(linf(eps), twin='{planted_fakes.TWIN}')`) of {planted_fakes.POINTS} images of"
        f" `{stored['split']}` of CIFAR-10 that are right when clean: honest networks first, then ResNet-20 with what"
        " is planted in it. A network that fails A10, A11 or A12 is not attacked."
        f" {done(stored['networks'], len(planted_fakes.CASES))}\n\n"
    ) + markdown(head, lines)


def devices(stored: Mapping[str, Any]) -> str:
    head = ["devices", "busy processes beside", "steps", "seconds", "aborted"]
    keys = ("devices", "busy_processes", "steps_taken", "seconds", "aborted")
    lines = [[str(row[key]) for key in keys] for row in stored["runs"]]
    return "Training on several devices of two busy cores.\n\n" + markdown(head, lines)


def records(stored: Mapping[str, Any]) -> str:
    bound = lambda name: "at {1} {0}".format(*bench_records.BOUNDS[name])
    lines = [
        [name, f"{value:.3g}", bound(name), "yes" if stored["kept"][name] else "**no**"]
        for name, value in stored["figures"].items()
    ]
    rates = "; ".join(
        f"{side} x {side} pixels: "
        + ", ".join(f"{name} {rate:,.0f}" for name, rate in each["records_a_second"].items())
        for side, each in stored["parts"]["rate"].items()
        if side != "commit"
    )
    commits = ", ".join(f"{name} of {part['commit']}" for name, part in stored["parts"].items())
    return (
        f"{stored['records']:,} generated JPEGs of 32 x 32 pixels in 16 files.\n\n"
        f"{markdown(['', 'measured', 'bound', 'kept'], lines)}\n\nRecords a second, of {rates}.\n\nParts:"
        f" {commits}."
    )


def faults(stored: Mapping[str, Any]) -> str:
    good, lines, bad = ("same numbers", "one line"), [], []
    for name, part in stored["parts"].items():
        verdicts = Counter()
        for each in part["faults"].values():
            verdicts.update(each)
        asked = f"{part['done']} of {part['asked']}" + (" each" if part["each"] else "")
        others = sum(number for words, number in verdicts.items() if words not in (*good, "skipped"))
        numbers = [verdicts["same numbers"], verdicts["one line"], others, round(part["slowest"])]
        lines.append([part["about"], asked, *map(str, numbers), ", ".join(each[:7] for each in part["commits"])])
        bad += [f"- {name}, {words}: {'; '.join(said)}" for words, said in part["said"].items()]
    head = ["what happens", "times", *good, "other", "slowest, s", "commit"]
    return markdown(head, lines) + ("\n\n" + "\n".join(bad) if bad else "")


def fuzzed(stored: Mapping[str, Any]) -> str:
    lines = [
        [f"`{name}`", f"{row['inputs']:,}", f"{row['read']:,}", f"{row['refused']:,}", f"{row['slowest']:.1f}",
         f"{row['largest_mb']}", f"{row['cpu_minutes']:.1f}"]
        for name, row in stored["readers"].items()
    ]  # fmt: skip
    head = ["reader", "inputs", "read", "refused in a line", "slowest, CPU s", "memory, MB", "CPU minutes"]
    failures = sum(sum(row["failures"].values()) for row in stored["readers"].values())
    before = stored["random_damage"]
    return (
        f"{markdown(head, lines)}\n\n{stored['cpu_minutes']} CPU minutes in all. {failures} inputs ended in something"
        " else when they were first met (in the file: which); what that was is mended, and the inputs are in"
        f" `tests/fuzzed`. Before, {before['read'] + before['refused']:,} files of weights were damaged at random, in"
        f" {before['cpu_minutes']} CPU minutes; the slowest took {before['slowest']:.2f} s."
    )


BENCHMARKS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("Pretrained weights", "pretrained", pretrained),
    ("Attacks of other packages", "parity_attacks", attacked),
    ("Two random searches", "parity_square", searching),
    ("Speed of attacks", "bench_attacks", attacking),
    ("A defended network, attacked", "resnet4b", defended),
    ("What makes a robust accuracy appear", "mistakes", mistaken),
    ("Gradients of other pools", "pool_surrogates", surrogates),
    ("Planted fakes", "planted_fakes", planted),
    ("Speed beside PyTorch", "bench_core", core),
    ("Speed beside PyTorch, Python 3.13", "bench_core_3.13", core),
    ("Memory", "bench_core", memory),
    ("Memory, Python 3.13", "bench_core_3.13", memory),
    ("ImageNet networks beside PyTorch", "bench_networks", networks),
    ("Attacks in a loop", "bench_loops", loops),
    ("The training loop", "bench_fit", fit),
    ("A set of the size of ImageNet", "bench_records", records),
    ("Manifests of checkpoints", "bench_checkpoint", checkpoints),
    ("What Top-GAP costs", "bench_pool", pool),
    ("What each system costs", "bench_systems", steps),
    ("Forms of convolutions", "bench_forms", forms),
    ("Networks of torchvision, timm, Hugging Face and RobustBench", "parity_networks", parity),
    ("Explanations and measures of other packages", "parity_explain", explained),
    ("Speed of explanations", "bench_explain", explaining),
    ("What does not make explanations faster", "bench_explain_ideas", explaining_ideas),
    ("Guided non-linearity beside its rivals, on real networks", "explain_claims", claims_of_maps),
    ("Where maps of fine-tuned networks lie", "localisation_claims", claims_of_places),
    ("What `trust` says of methods", "trust_claims", claims_of_trust),
    ("Memory of explanations", "bench_explain_memory", explaining_memory),
    ("Networks of other people", "foreign_networks", foreign),
    ("Many devices on a CPU", "stress_devices", devices),
)


if __name__ == "__main__":
    write()
