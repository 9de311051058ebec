"""What a training will need, before it is begun: its step is compiled, and never run."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topgap_jax.errors import UserError
from topgap_jax.mesh import data_mesh
from topgap_jax.run.checkpoint import KEPT
from topgap_jax.run.fit import Parts, fresh, make_step
from topgap_jax.types import Model


class Plan(NamedTuple):
    """parameters: numbers that are trained, and those that are not (batch statistics); flops of a step on all devices,
    None where the compiler does not say; memory {"arguments", "results", "temporary"}: bytes a device; steps: an epoch,
    in all; records: a host reads of the split; checkpoint {"last", "best"}: bytes of one."""

    parameters: int
    statistics: int
    flops: float | None
    memory: dict[str, int]
    steps: tuple[int, int]
    records: int
    checkpoint: dict[str, int]

    @property
    def memory_a_device(self) -> int:
        return sum(self.memory.values())

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints that are kept at once, and of one more while it is written."""
        return (KEPT + 1) * self.checkpoint["last"] + KEPT * self.checkpoint["best"]


def check_batch(batch: int, hosts: int, devices: int) -> None:
    """UserError where the devices do not divide a batch."""
    count = hosts * devices
    if batch % count:
        raise UserError(
            f"a batch of {batch} cannot be divided over {hosts} x {devices} = {count} devices; make config.batch a "
            f"multiple of {count}"
        )


def plan(parts: Parts, model: Model, *, resident: bool, hosts: int = 1, devices: int = 1) -> Plan:
    """The plan of a training on `hosts` of `devices` each, of which none need be here.

    parts: `train` and `validation` are not looked at. model: that of `parts` before it was made fast on a CPU, whose
    own convolutions the compiler cannot count. resident: whether the training split is held on every device.
    The batch is divided over the devices and everything else is on each of them, so that one device's program is the
    step with its share of the batch; sums over devices come on top. Compiled for the kind of device at hand: what
    another kind's compiler needs is near it, but not it. UserError where the devices do not divide the batch.
    """
    check_batch(parts.batch, hosts, devices)
    count = hosts * devices
    share = parts._replace(batch=parts.batch // count)
    state = jax.eval_shape(lambda: fresh(share, None))
    image = lambda n, dtype: jax.ShapeDtypeStruct((n, *share.image_shape), dtype)
    whole = lambda n, dtype=jnp.int32: jax.ShapeDtypeStruct((n,), dtype)
    rows = {"id": whole(share.batch), "mask": whole(share.batch, jnp.bool_)}
    held = {"image": image(parts.examples, jnp.uint8), "label": whole(parts.examples)} if resident else {}
    rows |= {} if resident else {"image": image(share.batch, jnp.uint8), "label": whole(share.batch)}
    one = data_mesh(jax.devices()[:1])
    compiled = make_step(share, one).lower(state, held, rows).compile()
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,  # the donated state is written over
        "temporary": sizes.temp_size_in_bytes,
    }
    flops = (make_step(share._replace(model=model), one).lower(state, held, rows).cost_analysis() or {}).get("flops")
    per_epoch = max(1, parts.examples // parts.batch)
    variables = state.variables
    return Plan(
        parameters=_numbers(variables["params"]),
        statistics=_numbers(variables.get("batch_stats", {})),
        flops=None if flops is None or not math.isfinite(flops) or flops <= 0 else flops * count,
        memory=memory,
        steps=(per_epoch, per_epoch * parts.epochs),
        records=parts.examples if resident else -(-parts.examples // hosts),
        checkpoint={"last": _bytes((variables, state.optimizer)), "best": _bytes(variables)},
    )


def table(about: Mapping[str, Any], made: Plan) -> str:
    """The plan in words, a line each. about: what stands before it, such as the network's text."""
    mega = lambda n: f"{n / 1e6:,.1f} MB"
    lines = dict(about) | {
        "parameters": f"{made.parameters:,} trained, {made.statistics:,} statistics",
        "steps": f"{made.steps[0]:,} an epoch, {made.steps[1]:,} in all",
        "records a host": f"{made.records:,}",
        "arithmetic": "not said by the compiler" if made.flops is None else f"{made.flops / 1e9:,.2f} GFLOP a step",
        "memory a device": f"{mega(made.memory_a_device)} = "
        + " + ".join(f"{mega(size)} {name}" for name, size in made.memory.items()),
        "checkpoints": f"{mega(made.checkpoint['last'])} last, {mega(made.checkpoint['best'])} best, "
        f"{mega(made.disk)} on the disk at most",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def _numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
