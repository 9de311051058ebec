"""The table of studies: what each trains, what it measures, and what has to hold before an effect is the method's
own."""

from collections.abc import Mapping
from typing import NamedTuple


class Arm(NamedTuple):
    """One way to train and explain.

    of: the arm of the config file that it is, "" where the config is used as it stands; overrides: keys of the config
    on top; explain: the explanation that stands for EXPLAIN in the study's evaluators; trained_as: the arm whose
    trained run it looks at, "" its own.
    """

    of: str = ""
    overrides: Mapping[str, str] = {}
    explain: str = ""
    trained_as: str = ""


class Claim(NamedTuple):
    """What a paper claims. measure: "split | evaluator | name"; sign: +1 if the method is said to raise it, else -1.

    bound: a number beyond which the method itself is said to lie; None: it is compared with its controls.
    """

    measure: str
    words: str
    sign: int
    bound: float | None = None


class Study(NamedTuple):
    """Arms of one config, each with every seed; the first arm is the plain control.

    method: the arm that the claims are about; decides: the control that it must beat, as well as the plain one, before
    an effect is the method's own; evaluators: (split, text), () for those of the config on its test splits; shown:
    {"evaluator | name": words}, the rows of its table on every split that has them; pictures: the explanation of
    `--page`, "" the arm's own; keeps: whether the trained networks are kept in results/weights.
    """

    title: str
    paper: str
    turned_on: str
    claimed: str
    config: str
    arms: Mapping[str, Arm]
    method: str
    decides: str
    seeds: tuple[int, ...]
    evaluators: tuple[tuple[str, str], ...]
    shown: Mapping[str, str]
    claims: tuple[Claim, ...] = ()
    pictures: str = ""
    keeps: bool = False


PGD = "robust(pgd(linf(eps), steps=20))"
CAM_ON_REGIONS = "localisation(cam(), boxes=False)"
SPREAD = "measures(integrated(), gini(), extent())"
CAM_SPREAD = "measures(grad_cam('stage3'), gini(), extent())"  # what the drop flattens in training: shown, not claimed
COVERAGE = "coverage('stage2', 'stage3')"
MAP = "gradient(reduce='abs_sum')"
SPARSITY = f"measures({MAP}, gini(), extent(), energy())"
MOVED = f"attributional_robustness({MAP}, topk_attack({MAP}, linf(eps), steps=20, restarts=2))"
# The mean colour is the baseline of integrated gradients too, which favours it: so three substrates.
DELETION = "measures(EXPLAIN, deletion(), insertion(), labels='predicted')"
DELETION_BLUR = "measures(EXPLAIN, deletion(substrate='blur'), labels='predicted')"
DELETION_BLACK = "measures(EXPLAIN, deletion(substrate=0.0), labels='predicted')"

ACCURACY = {"accuracy() | accuracy": "accuracy"}
TOP_GAP = {
    "title": "Top-GAP",
    "paper": "2409.04819",
    "claimed": "accuracy and better localisation",
}
REAL = ACCURACY | {
    "accuracy() | nll": "NLL",
    "localisation(cam()) | iou": "IoU of the class map, tau .5",
    "localisation(cam()) | best_iou": "... at its best tau",
    "localisation(cam()) | centre_iou": "... of a centred box",
    "localisation(cam()) | full_iou": "... of the full image",
    "localisation(cam()) | max_box_accuracy": "MaxBoxAcc of the class map",
    "localisation(cam()) | centre_box_accuracy": "... of a centred box",
    "localisation(cam()) | full_box_accuracy": "... of the full image",
    "localisation(grad_cam('stage4')) | iou": "IoU of Grad-CAM, tau .5",
    "localisation(grad_cam('stage4')) | max_box_accuracy": "MaxBoxAcc of Grad-CAM",
    "regions(fill=mean) | foreground_sensitivity": "foreground sensitivity",
    "regions(fill=mean) | background_gap": "background gap",
    "receptive_field() | rms_radius": "ERF radius, pixels",
    "receptive_field() | centre_corner_ratio": "ERF centre / corner",
}


def _real(config: str, arms: Mapping[str, Arm], method: str, seeds: tuple[int, ...] = (0,), **more) -> Study:
    """GAP beside Top-GAP on real data; of one seed no difference is decided."""
    turned_on = f"`{arms[method].overrides.get('pool', method)}`"
    return Study(
        **TOP_GAP,
        turned_on=turned_on,
        config=config,
        arms=arms,
        method=method,
        decides="gap",
        seeds=seeds,
        evaluators=(),
        shown=REAL,
        **more,
    )


RADII = "eps=(1/255, 2/255, 4/255, 8/255)"
CURVE = f"curve(pgd(linf(eps), steps=20), {RADII})"
AUTOATTACK = "robust(autoattack(linf(eps)))"
AUDIT = "audit(linf(eps))"


def _robust(kind: str, seeds: tuple[int, ...] = (0,)) -> Study:
    """The claim of robustness (arXiv 2409.04819: over 50 % under PGD-20 at 8/255): GAP beside Top-GAP on CIFAR-10."""
    method = f"{kind}top_gap"
    return Study(
        title="Top-GAP",
        paper="2409.04819",
        turned_on=f"`{method}`",
        claimed="over 50 % under PGD-20 at 8/255, at an unchanged accuracy",
        config="cifar10.py",
        arms={name: Arm(name) for name in (f"{kind}gap", method)},
        method=method,
        decides=f"{kind}gap",
        seeds=seeds,
        evaluators=(("test", "accuracy()"), ("test[:1000]", CURVE), ("test[:250]", AUTOATTACK), ("test[:128]", AUDIT)),
        shown=ACCURACY
        | {"accuracy() | nll": "NLL"}
        | {f"{CURVE} | accuracy_at_{i}": f"PGD-20 accuracy, {eps}/255" for i, eps in enumerate((1, 2, 4, 8), 1)}
        | {f"{AUTOATTACK} | robust_accuracy": "AutoAttack accuracy, 8/255"}
        | {f"{AUDIT} | checks_failed": "checks of the audit that failed"},
        claims=(
            Claim(f"test[:1000] | {CURVE} | accuracy_at_4", "over 50 % under PGD-20 at 8/255", 1, bound=0.5),
            Claim(f"test[:1000] | {CURVE} | accuracy_at_4", "more under PGD-20 at 8/255 than with gap()", 1),
        ),
        keeps=True,
    )


PETS = ("gap", "top_gap .5", "top_gap .28", "top_gap .1", "top_gap .05", "plain")
TINY = ("gap", "top_gap .25")

STUDIES = {
    "shapes": Study(
        **TOP_GAP,
        turned_on="`top_gap(fraction=.14)`",
        config="shapes.py",
        arms={name: Arm(name) for name in ("gap", "top_gap .05", "top_gap .14", "top_gap .3")},
        method="top_gap .14",
        decides="gap",  # the same head
        seeds=(0, 1, 2, 3, 4),
        evaluators=(),
        shown=ACCURACY
        | {
            "accuracy() | worst_group_accuracy": "worst-group accuracy",
            "accuracy() | nll": "NLL",
            "accuracy() | calibration_error": "calibration error",
            f"{PGD} | robust_accuracy": "PGD-20 accuracy, 2/255",
            f"{CAM_ON_REGIONS} | iou": "IoU of the class map",
            f"{CAM_ON_REGIONS} | best_iou": "IoU at its best tau",
            f"{CAM_ON_REGIONS} | in_region": "share of the map in the object",
            "regions(fill=mean) | foreground_sensitivity": "foreground sensitivity",
            "regions(fill=mean) | foreground_accuracy": "accuracy, object alone",
            "regions(fill=mean) | background_accuracy": "accuracy, background alone",
            "regions(fill=mean) | background_gap": "background gap",
            "receptive_field() | rms_radius": "ERF radius, pixels",
            "receptive_field() | centre_corner_ratio": "ERF centre / corner",
            "receptive_field() | top_lift": "ERF lift of the top position",
        },
        claims=(
            Claim("test_shifted | accuracy() | accuracy", "accuracy under shift", 1),
            Claim(f"test | {CAM_ON_REGIONS} | iou", "IoU of the class map", 1),
        ),
        pictures="cam()",
    ),
    "sgdrop": Study(
        title="SGDrop",
        paper="2409.17370",
        turned_on="`with_drop(model, 'stage3', sgdrop(rate=linear(0, .1, total_steps)))`",
        claimed="higher accuracy on little data, wider maps, higher neuron coverage",
        config="sgdrop.py",
        arms={name: Arm(name) for name in ("plain", "sgdrop", "random_matched")},
        method="sgdrop",
        decides="random_matched",
        seeds=(0, 1, 2),
        evaluators=(
            ("train[:2000]", "accuracy()"),
            ("test", "accuracy()"),
            ("test[:1000]", SPREAD),
            ("test[:1000]", CAM_SPREAD),
            ("test[:1000]", COVERAGE),
        ),
        shown=ACCURACY
        | {
            f"{SPREAD} | effective_share": "effective area of integrated gradients",
            f"{SPREAD} | gini": "Gini index of integrated gradients",
            f"{CAM_SPREAD} | effective_share": "effective area of Grad-CAM",
            f"{CAM_SPREAD} | gini": "Gini index of Grad-CAM",
            f"{COVERAGE} | neuron_coverage": "neuron coverage",
            f"{COVERAGE} | image_coverage": "neuron coverage of one image",
        },
        claims=(
            Claim("test | accuracy() | accuracy", "accuracy", 1),
            Claim(f"test[:1000] | {SPREAD} | effective_share", "effective area of integrated gradients", 1),
            Claim(f"test[:1000] | {COVERAGE} | neuron_coverage", "neuron coverage", 1),
        ),
        pictures="grad_cam('stage3')",
    ),
    "norm_regularised": Study(
        title="Norm-regularised training",
        paper="2404.04647",
        turned_on="`norm_regularised(l1_norm(eps))`",
        claimed="sparser gradient maps",
        config="norm_regularised.py",
        # l2_norm: as large in the Euclidean norm as l1_norm's perturbation, but its penalty is not of the l1 kind.
        # r_fgsm is the dual twin of l1_norm, so it decides nothing: adversarial training of the same radius.
        arms={name: Arm(name) for name in ("standard", "l1_norm", "group_norm", "l2_norm", "r_fgsm")},
        method="l1_norm",
        decides="l2_norm",
        seeds=(0, 1, 2),
        evaluators=(("test", "accuracy()"), ("test[:1000]", SPARSITY), ("test[:500]", PGD)),
        shown=ACCURACY
        | {
            f"{SPARSITY} | gini": "Gini index of the gradient map",
            f"{SPARSITY} | effective_share": "its effective area",
            f"{SPARSITY} | energy": "its share in the object",
            f"{PGD} | robust_accuracy": "PGD-20 accuracy, .5/255",
        },
        claims=(Claim(f"test[:1000] | {SPARSITY} | gini", "Gini index of the gradient map", 1),),
        pictures=MAP,
    ),
    "art": Study(
        title="ART",
        paper="1911.13073",
        turned_on="`art(mean=mean, std=std)`",
        claimed="explanations that a small change of the image does not move",
        config="art.py",
        arms={"standard": Arm("standard"), "art": Arm("art"), "attack alone": Arm("attack")},
        method="art",
        decides="attack alone",  # the same attack on the alignment, and no alignment loss
        seeds=(0, 1, 2),
        evaluators=(("test", "accuracy()"), ("test[:500]", MOVED), ("test[:500]", PGD)),
        shown=ACCURACY
        | {
            f"{MOVED} | topk_intersection": "top-k intersection of the attacked gradient map",
            f"{MOVED} | kendall_tau_b": "its Kendall tau-b",
            f"{MOVED} | cosine": "its cosine",
            f"{PGD} | robust_accuracy": "PGD-20 accuracy, 8/255",
        },
        claims=(
            Claim(f"test[:500] | {MOVED} | topk_intersection", "top-k intersection of the attacked gradient map", 1),
            Claim(f"test[:500] | {MOVED} | kendall_tau_b", "its Kendall tau-b", 1),
        ),
        pictures=MAP,
    ),
    "guided": Study(
        title="Guided non-linearity",
        paper="ICPR 2020",
        turned_on="`integrated(rules=guided)`",
        claimed="lower deletion score than integrated gradients",
        config="guided.py",
        arms={"integrated": Arm(explain="integrated()")}
        | {
            name: Arm(explain=explain, trained_as="integrated")
            for name, explain in {
                "guided": "integrated(rules=guided)",
                "guided_upsampled": "integrated(rules=guided_upsampled)",
                "one step": "integrated(steps=1, rule='riemann_right', rules=guided_backprop)",
                "average": "integrated(rules=guided, multiply_by_inputs=False)",
            }.items()
        },
        method="guided",
        decides="one step",
        seeds=(0, 1, 2),
        evaluators=(
            ("test", "accuracy()"),
            ("test[:500]", DELETION),
            ("test[:500]", DELETION_BLUR),
            ("test[:500]", DELETION_BLACK),
        ),
        shown=ACCURACY
        | {
            f"{DELETION} | deletion": "deletion score, mean colour",
            f"{DELETION_BLUR} | deletion": "deletion score, blur",
            f"{DELETION_BLACK} | deletion": "deletion score, black",
            f"{DELETION} | insertion": "insertion score, mean colour",
        },
        claims=(
            Claim(f"test[:500] | {DELETION} | deletion", "deletion score, mean colour", -1),
            Claim(f"test[:500] | {DELETION_BLUR} | deletion", "deletion score, blur", -1),
            Claim(f"test[:500] | {DELETION_BLACK} | deletion", "deletion score, black", -1),
        ),
    ),
    "cifar10_robust": _robust("", seeds=(0, 1)),
    "cifar10_pyramid": _robust("pyramid "),
    "cifar10_adversarial": _robust("adversarial "),
    "tiny_imagenet20": _real("tiny_imagenet20.py", {name: Arm(name) for name in TINY}, "top_gap .25"),
    "pets3": _real(
        "pets3.py",
        {name: Arm(name) for name in PETS},
        "top_gap .28",
        seeds=(0, 1, 2),
        claims=(
            Claim("test | accuracy() | accuracy", "accuracy", 1),
            Claim("test | localisation(cam()) | iou", "IoU of the class map", 1),
        ),
    ),
}
SYSTEMS = ("sgdrop", "norm_regularised", "art", "guided")
