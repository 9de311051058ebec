"""PyTorch's half of parity_attacks.py: reads lines of JSON, runs one attack of a public package on each, and answers
with a line: which images are right when clean and stay so, their margins, and the seconds.

{"network": "resnet20" or "efficientnet_lite0", "weights": its file, "images": .npy (n, h, w, 3) float32 in [0, 1],
"labels": .npy (n,), "package", "attack", "norm": "Linf", "L2" or "L1", "eps", "steps", "batch", and perhaps "seed"}. An
example is broken if a forward pass on what the attack returns says so. Margins are z_y less the largest other logit.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from _bench_explain_torch import choose, network
from _bench_torch import pgd


def auto_attack(model, words):
    """Single attacks of fra31/auto-attack, by way of `pyautoattack`, which packages it."""
    import logging

    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    options = {"norm": words["norm"], "eps": words["eps"], "device": "cpu", "seed": words.get("seed", 0)}
    log, steps = logging.getLogger("auto-attack"), words["steps"]
    kind, sparse = words["attack"], words["norm"] == "L1"
    if kind == "autoattack":
        attack = AutoAttack(model, version="standard", **options)
        return lambda x, y: attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    if kind in ("apgd-ce", "apgd-dlr"):
        attack = APGDAttack(model, n_iter=steps, loss=kind[5:], use_largereps=sparse, logger=log, **options)
    elif kind == "apgd-t":
        number = 5 if sparse else 9
        attack = APGDAttack_targeted(
            model, n_iter=steps, n_target_classes=number, use_largereps=sparse, logger=log, **options
        )
    elif kind == "fab-t":
        attack = FABAttack_PT(model, n_iter=steps, targeted=True, n_target_classes=9, n_restarts=1, **options)
    elif kind == "square":
        attack = SquareAttack(model, n_queries=steps, p_init=0.8, n_restarts=1, resc_schedule=False, **options)
        return lambda x, y: searched(attack, x, y)
    else:
        raise SystemExit(f"auto-attack has no {kind}")
    return attack.perturb


def searched(attack, x, y):
    """The best image of one run, also where that is not misclassified: `perturb` gives the clean one there."""
    attack.init_hyperparam(x)
    torch.manual_seed(attack.seed)
    return attack.attack_single_run(x, y)[1]


def torch_attacks(model, words):
    import torchattacks

    eps, steps, kind = words["eps"], words["steps"], words["attack"]
    if kind == "pgd" and words["norm"] == "Linf":
        return torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / steps, steps=steps)
    if kind == "pgd" and words["norm"] == "L2":
        return torchattacks.PGDL2(model, eps=eps, alpha=2.5 * eps / steps, steps=steps)
    if kind in ("apgd-ce", "apgd-dlr"):
        return torchattacks.APGD(model, norm=words["norm"], eps=eps, steps=steps, loss=kind[5:])
    raise SystemExit(f"torchattacks: {words['norm']} {kind} is not compared")


def fool_box(model, words):
    import foolbox

    eps, steps = words["eps"], words["steps"]
    kinds = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD, "L1": foolbox.attacks.L1PGD}
    attack = kinds[words["norm"]](abs_stepsize=2.5 * eps / steps, steps=steps, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    return lambda x, y: attack(wrapped, x, y, epsilons=eps)[1]


def loop(model, words):
    """PGD in linf as PyTorch users write it (_bench_torch.py), channels_last."""
    model.to(memory_format=torch.channels_last)
    return lambda x, y: pgd(model, x.to(memory_format=torch.channels_last), y, words["steps"], words["eps"])


PACKAGES = {"auto-attack": auto_attack, "torchattacks": torch_attacks, "foolbox": fool_box, "loop": loop}


def margins(model, attack, images, labels, batch):
    """float (n,): of what the attack makes of the image, and of the image itself where that is misclassified."""
    rows = []
    for start in range(0, len(images), batch):
        x, y = images[start : start + batch], labels[start : start + batch]
        row = margin(model, x, y)
        right = row > 0
        if right.any():
            with torch.enable_grad():
                adversarial = attack(x[right], y[right]).detach()
            row[right.clone()] = margin(model, adversarial, y[right])
        rows.append(row)
    return torch.cat(rows)


@torch.no_grad()
def margin(model, images, labels):
    logits = model(images)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.amax(1)


def main():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    for line in sys.stdin:
        words = json.loads(line)
        model = choose(network(words["network"], words["weights"]), torch.float32)
        images = torch.from_numpy(np.load(words["images"])).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(np.load(words["labels"])).long()
        torch.manual_seed(0)
        start = time.perf_counter()
        attack = PACKAGES[words["package"]](model, words)
        # What packages print goes to stderr: the answer is the one line on stdout.
        answer, sys.stdout = sys.stdout, sys.stderr
        values = margins(model, attack, images, labels, words["batch"])
        sys.stdout = answer
        seconds = time.perf_counter() - start
        said = {"robust": (values > 0).tolist(), "margins": values.tolist(), "seconds": seconds}
        print(json.dumps({**said, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
