"""Mesh, the one table from logical axes to mesh axes, and the sharding of a state before it is allocated."""

import dataclasses
import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Parameters are split over (fsdp, seq) jointly: whatever the mesh is used for, no chip holds a second copy.
PARAMETER = ("fsdp", "seq")
RULES = {
    "batch": ("data", "fsdp"),
    "embed": PARAMETER,  # the model width of a matrix; its other axis stays whole
    "features": None,  # widths of q, k, v, mlp, modulation
    "layers": None,  # the scanned axis
    "vector": None,  # biases, norm scales, rows of small tables
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "all that are left"."""

    data: int = -1
    fsdp: int = 1
    seq: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A (data, fsdp, seq) mesh over all devices; ValueError if the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    described = " × ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1 or fixed < 1 or any(size < -1 or size == 0 for size in sizes.values()):
        raise ValueError(f"mesh {described}: sizes must be positive, and at most one may be -1")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {described} does not fill the {len(devices)} devices; set config.mesh so that it does")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """ValueError unless the global batch divides over the data and fsdp axes of the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        below = batch_size // shards * shards
        near = f"{below} or {below + shards}" if below else f"{shards}"
        raise ValueError(
            f"batch size {batch_size} does not divide over data × fsdp = "
            f"{mesh.shape['data']} × {mesh.shape['fsdp']} = {shards} devices; nearest that does: {near}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data × fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(names, shape, mesh: Mesh) -> PartitionSpec:
    """The mesh axes of an array by RULES; names are its logical axes.

    An axis that does not divide by its mesh axes stays whole: a tiny model on a large mesh is replicated, not refused.
    Raises ValueError for a name that RULES lacks and for a mesh axis that two axes of the array claim.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise ValueError(f"logical axis {unknown[0]!r} is not in the table; known: {', '.join(RULES)}")
    axes = [RULES[name] for name in names]
    claimed = [mesh_axis for axis in axes if axis for mesh_axis in axis]
    if len(claimed) != len(set(claimed)):
        raise ValueError(f"logical axes {tuple(names)} of an array {tuple(shape)} claim a mesh axis twice: {claimed}")
    return PartitionSpec(
        *(
            axis if axis and size % math.prod(mesh.shape[name] for name in axis) == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def state_sharding(abstract_state, mesh: Mesh):
    """Shardings of a state from the logical axes of its abstract, still boxed, leaves (jax.eval_shape of its init)."""

    def is_boxed(leaf):
        return isinstance(leaf, nn.Partitioned)

    def sharding(leaf):
        if not is_boxed(leaf):
            return replicated(mesh)  # counters
        return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))

    return jax.tree.map(sharding, abstract_state, is_leaf=is_boxed)
