"""The arms of a config on real data, each trained in its budget and evaluated: results/<config>.json, quoted in the config's header.

    python experiments/arms.py --config configs/cifar10.py --arms 'gap()' 'top_gap(k=16)'

The first arm is the control. One seed by default, so a difference here decides nothing; each arm states its CPU minutes. A run
that is there already is not trained again.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from topgap_jax import setup
from topgap_jax.progress import write_text
from topgap_jax.run import checkpoint
from topgap_jax.run.cpu import configure_cpu
from topgap_jax.run.fit import fit
from topgap_jax.run.provenance import provenance
from topgap_jax.setup.assembly import total_steps

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", required=True, metavar="POOL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    print(configure_cpu(), file=sys.stderr)
    arms = {}
    for pool in arguments.arms:
        workdir = arguments.runs / f"{arguments.config.stem}_{re.sub(r'[^a-z0-9.]+', '_', pool).strip('_')}"
        experiment = setup.experiment(arguments.config, [("pool", pool), ("seed", str(arguments.seed))])
        if checkpoint.latest_step(workdir) != total_steps(experiment.config, experiment.source):
            fit(experiment.config, workdir, parts=setup.parts(experiment), file=arguments.config)
        loaded = setup.restored(experiment, workdir, "last")
        rows = setup.evaluate(loaded)
        _, meta = checkpoint.restore(workdir, "last", {})
        # Runs made before checkpoints kept their seconds have none.
        minutes = {
            name: round(meta[key] / 60, 1) for name, key in (("cpu", "cpu_seconds"), ("wall", "seconds")) if key in meta
        }
        arms[pool] = {"weights": loaded.weights, "training_minutes": minutes, "rows": rows}
        result = {**provenance(), "config": f"configs/{arguments.config.name}", "seed": arguments.seed, "arms": arms}
        out = ROOT / "results" / f"{arguments.config.stem}.json"
        out.parent.mkdir(exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
        for row in rows:
            print(
                pool,
                row["split"],
                row["evaluator"],
                {k: round(v, 4) for k, v in row["values"].items() if v is not None},
            )


if __name__ == "__main__":
    main()
