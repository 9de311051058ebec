"""The one mesh: all devices along one axis, "data". State is replicated, batches are split.

Axes are Auto: under JAX's default, Explicit axes, indexing by labels and sorting over the batch are errors.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from topgap_jax.errors import UserError


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data", over `devices` (all devices of all processes by default)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Every device holds its share of the leading axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raise a UserError unless the devices divide the batch."""
    if batch < 1 or batch % mesh.size:
        below = batch // mesh.size * mesh.size
        near = f"{below} or {below + mesh.size}" if below > 0 else f"{mesh.size}"
        raise UserError(f"batch={batch} cannot be split evenly over {mesh.size} devices; take {near}")
