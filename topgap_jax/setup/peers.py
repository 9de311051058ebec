"""What must be the same in all processes of a run, beside its command line and versions: config, data, weights."""

import hashlib
import json
import random
from collections.abc import Iterable
from typing import Any

import jax

from topgap_jax.data import Source
from topgap_jax.measure.verdicts import fingerprint
from topgap_jax.run import hosts
from topgap_jax.setup import expressions
from topgap_jax.setup.assembly import Experiment
from topgap_jax.types import Variables

SAMPLED = 64  # records of a split whose digest stands for all


def agree(chosen: Experiment, splits: Iterable[str] | None = None, variables: Variables | None = None) -> None:
    """Refuse a process of another config, other data or other weights, by its number: UserError in all of them.

    splits: those that are read, by default all that the config names. Nothing happens in a process alone.
    """
    if jax.process_count() == 1:
        return
    config = chosen.config
    if splits is None:
        splits = [config.train, config.validation, *expressions.split_list(config.test)]
    facts = {f"config.{key}": value for key, value in json.loads(json.dumps(config, default=dict)).items()}
    for split in dict.fromkeys(filter(None, splits)):
        facts |= {
            f"{config.source} split '{split}', {what}": value for what, value in data(chosen.source(split)).items()
        }
    hosts.agree(facts | ({} if variables is None else {"the weights' digest": fingerprint(variables)}))


def data(source: Source) -> dict[str, Any]:
    """{"records", "shards" where it has them, "digest of N records"} of a split."""
    n = len(source)
    number = min(SAMPLED, n)
    sampled = hashlib.blake2b(digest_size=8)
    for index in sorted(random.Random(n).sample(range(n), number)):
        record = source[index]
        sampled.update(f"{record['image'].shape} {record['label']}".encode() + record["image"].tobytes())
    shards = {"shards": list(source.shards)} if source.shards else {}
    return {"records": n, **shards, f"digest of {number} records": sampled.hexdigest()}
