"""What does `trust` call methods whose answer the field knows? On two networks with published weights.

    TOPGAP_DATA=FOLDER python experiments/trust_claims.py [NETWORK ...]

Guided backprop, deconvnet and an edge filter are said to show the image rather than the network (arXiv 1810.03292,
1912.09818); gradients and Grad-CAM to show the network. ResNet-20 on 64 test images of CIFAR-10, EfficientNet-Lite0 on
16 pictures of imagenet500. The bounds of the checks are those of the library. A method that is done is kept in runs/
with its commit, so that the same command goes on where it was stopped. Writes results/trust_claims.json where all is
there, on a tree without changes.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from topgap_jax import setup
from topgap_jax.measure import results
from topgap_jax.progress import write_text
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.provenance import provenance

HERE = Path(__file__).parent
NETWORKS = {  # config, weights, split, images at a time
    "ResNet-20": ("cifar10.py", "resnet20_cifar10", "test[:64]", 64),
    "EfficientNet-Lite0": ("imagenet.py", "efficientnet_lite0_imagenet", "test[:16]", 16),
}
METHODS = {  # whether it is said to show the network
    "gradient()": True,
    "grad_cam()": True,
    "gradient(rules=guided_backprop)": False,
    "gradient(rules=deconvnet)": False,
    "edges()": False,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    options = parser.parse_args()
    if not os.environ.get("TOPGAP_DATA"):
        parser.error("TOPGAP_DATA is the folder with tfds/ and weights/")
    print(configure_cpu(), file=sys.stderr)
    about, kept = provenance(), HERE.parent / "runs" / "trust_claims.json"
    clean = not (about["commit"] or "+").endswith("+")
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for network in options.networks:
        config, weights, split, batch = NETWORKS[network]
        file = Path(os.environ["TOPGAP_DATA"], "weights", f"{weights}.safetensors")
        loaded = setup.from_config(HERE.parent / "configs" / config, [("init", str(file))])
        for method, shows_network in METHODS.items():
            if method not in rows.setdefault(network, {}):
                start = time.process_time()
                (row,) = setup.evaluate(loaded, splits=split, evaluators=f"trust({method})", batch=batch)
                stored = results.to_json(row)
                rows[network][method] = {
                    "said_to_show_the_network": shows_network,
                    "split": split,
                    "audit": row.audit,
                    "checks": stored["checks"],
                    "measures": {name: one for name, one in stored["measures"].items() if "value" in one},
                    "cpu_seconds": round(time.process_time() - start, 1),
                    "commit": about["commit"],
                }
                kept.parent.mkdir(exist_ok=True)
                write_text(kept, json.dumps(rows))
            print(f"{network:20}{method:34}{rows[network][method]['audit']}", flush=True)
    complete = all(set(rows.get(network, {})) == set(METHODS) for network in NETWORKS)
    if clean and complete and not any(each["commit"].endswith("+") for one in rows.values() for each in one.values()):
        write_text(HERE.parent / "results/trust_claims.json", json.dumps({**about, "networks": rows}, indent=1) + "\n")
    else:
        print("not written: that is for all of it, on a tree without changes", file=sys.stderr)


if __name__ == "__main__":
    main()
