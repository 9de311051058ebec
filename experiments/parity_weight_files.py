"""Are files that PyTorch writes read here as PyTorch reads them with weights_only=True?

    TOPGAP_PEER_PYTHON=.venv-bench/bin/python python experiments/parity_weight_files.py

Both forms (zip and legacy), tensors that are not contiguous, shared storages, half, bfloat16 and double, parameters,
buffers, tensors with attributes, nested dictionaries, a checkpoint with an optimiser and an argparse.Namespace. Names,
shapes, types and every number must be the same. Writes results/parity_weight_files.json.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from topgap_jax import pretrained
from topgap_jax.run.provenance import provenance

HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("TOPGAP_PEER_PYTHON"), help="or TOPGAP_PEER_PYTHON")
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("name the Python that has torch: --peer-python or TOPGAP_PEER_PYTHON")
    with tempfile.TemporaryDirectory() as folder:
        call = [options.peer_python, HERE / "_parity_weight_files_peer.py", folder]
        peer = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        files = {name: compare(Path(folder, name), types) for name, types in peer["files"]}
    for name, row in files.items():
        print(f"{name:28} {row['tensors']:3} tensors  {'equal' if row['equal'] else 'NOT EQUAL'}")
    about = provenance()
    about["versions"] |= peer["versions"]
    agree = all(row["equal"] for row in files.values())
    path = HERE.parent / "results" / "parity_weight_files.json"
    path.write_text(json.dumps({**about, "agree": agree, "files": files}, indent=1) + "\n")
    return 0 if agree else 1


def compare(path, types):
    arrays = pretrained.tensors(path)
    with np.load(path.with_suffix(".npz")) as file:
        expected = dict(file)
    equal = list(arrays) == list(expected) and all(
        str(arrays[name].dtype) == types[name]
        and arrays[name].shape == values.shape
        and np.array_equal(arrays[name].astype(np.float64), values)
        for name, values in expected.items()
    )
    return {"tensors": len(arrays), "equal": equal}


if __name__ == "__main__":
    raise SystemExit(main())
