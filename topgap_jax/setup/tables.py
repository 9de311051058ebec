"""Every function and value that a config's text may name, by room, and the functions that one uses from Python."""

from collections.abc import Mapping
from typing import Any

from topgap_jax import (
    attacks,
    balls,
    data,
    drops,
    engine,
    evaluators,
    explain,
    metrics,
    models,
    penalties,
    pool,
    rewrite,
    rules,
    scores,
)
from topgap_jax.build import merged, table
from topgap_jax.training import augment, objectives, optimizers, schedules
from topgap_jax.types import Table

ROOMS: dict[str, Table] = {
    "models": merged(models.TABLE, table(rewrite.with_pool, rewrite.with_drop)),
    "pools": pool.TABLE,
    "drops": drops.TABLE,
    "data": data.TABLE,
    "objectives": objectives.TABLE,
    "augmentation": augment.TABLE,
    "optimizers": optimizers.TABLE,
    "schedules": schedules.TABLE,
    "balls": balls.TABLE,
    "penalties": penalties.TABLE,
    "scores": scores.TABLE,
    "attacks": attacks.TABLE,
    "explanations": merged(explain.TABLE, table(rewrite.tokens)),
    "rules": rules.TABLE,
    "metrics": metrics.TABLE,
    "evaluators": evaluators.TABLE,
}
TABLE: Table = merged(*ROOMS.values())
NAMED: dict[str, Mapping[str, Any]] = {"scores": scores.VALUES, "rules": rules.VALUES}
VALUES: Mapping[str, Any] = merged(*NAMED.values())
"""What a text may name without a call, beside the keys of the config and what the run knows."""

PYTHON: dict[str, Table] = {
    "tg.models": table(models.bind, models.fast),
    "tg.attacks": table(attacks.attack),
    "tg.rewrite": table(
        rewrite.layers, rewrite.read, rewrite.tap, rewrite.with_rules, rewrite.fast_convs, rewrite.fold_batch_norm,
        rewrite.fused,
    ),
    "tg.engine": {"engine.explain": engine.explain},
}  # fmt: skip
"""What one calls in a program, {room: functions}: `topgap help` shows them too."""
