"""Mesh, the one table from logical axes to mesh axes, and the sharding of a state before it is allocated.

Networks are traced with the mesh as JAX's own context (jax.set_mesh, which is part of jit's cache key) and ask for it
here; without one, or with a mesh of one device, nothing of this touches them.
"""

import dataclasses
import math
from typing import Annotated

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rcm_jax.util.ranges import config

# Parameters are split over (fsdp, seq) jointly: whatever the mesh is used for, no chip holds a second copy.
PARAMETER = ("fsdp", "seq")
RULES = {
    "batch": ("data", "fsdp"),
    "tokens": ("seq",),  # of activations
    "heads": ("seq",),  # inside self-attention, in the place of tokens
    "embed": PARAMETER,  # the model width of a matrix; its other axis stays whole
    "features": None,  # widths of q, k, v, mlp, modulation
    "rank": None,  # of adapters
    "layers": None,  # the scanned axis
    "vector": None,  # biases, norm scales, rows of small tables
}
LARGEST_WHOLE = 2**20  # elements (4 MiB in float32): a larger parameter must be split where RULES say so


def _devices(size: int) -> str:
    """Rule of a field."""
    return "" if size == -1 or 1 <= size <= 2**20 else "-1 (all that are left), or from 1 to 1,048,576"


Devices = Annotated[int, _devices]


@config
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "all that are left"."""

    data: Devices = -1
    fsdp: Devices = 1
    seq: Devices = 1

    def __post_init__(self):
        if (self.data, self.fsdp, self.seq).count(-1) > 1:
            raise ValueError(f"data {self.data}, fsdp {self.fsdp}, seq {self.seq}: at most one of them may be -1")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A (data, fsdp, seq) mesh over all devices; ValueError if the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    described = " × ".join(f"{axis}={size}" for axis, size in sizes.items())
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {described} does not fill the {len(devices)} devices; set config.mesh so that it does")
    # As jax.make_mesh, but an axis of a TPU's torus may be split: fsdp = 64 on 4×4×8 chips.
    places = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(places, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """ValueError unless the global batch, in so many parts, divides over the data and fsdp axes of the mesh."""
    shards = batch_shards(mesh)
    unit = shards * parts
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        accumulated = f", in {parts} parts (train.accumulate)" if parts > 1 else ""
        raise ValueError(
            f"batch size {batch_size}{accumulated} does not divide over data × fsdp = "
            f"{mesh.shape['data']} × {mesh.shape['fsdp']} = {shards} devices; nearest that does: {near}"
        )


HOST = "pinned_host"  # JAX's name for the memory of the machine that an accelerator is in


def has_host_memory(mesh: Mesh) -> bool:
    """Whether arrays of these devices can lie in the memory of their hosts."""
    return any(memory.kind == HOST for memory in mesh.local_devices[0].addressable_memories())


def in_host_memory(shardings):
    """The same shardings, in the memory of the hosts; counters stay with the device."""
    return jax.tree.map(lambda s: s.with_memory_kind(HOST) if s.spec else s, shardings)


def check_sequence(num_heads: int, grid, mesh, patch=(1, 1, 1)) -> None:
    """ValueError unless heads and tokens divide over seq.

    grid: numbers of tokens, (l,) or (frames, rows, columns) of `patch` latents each; the latter lets the message say
    which latents would do.
    """
    tokens, seq = math.prod(grid), _size(RULES["tokens"], mesh)
    fitting = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0 and tokens % n == 0]
    way_out = f"set config.mesh.seq to one of {', '.join(fitting)}, which divide {num_heads} heads and {tokens} tokens"
    if num_heads % seq:
        raise ValueError(f"{num_heads} heads do not divide over seq = {seq} devices, one share each: {way_out}")
    if tokens % seq:
        if len(grid) > 1:
            way_out += f"; or change the latents to {_nearest_latents(grid, patch, seq)}"
        raise ValueError(f"{' × '.join(map(str, grid))} = {tokens} tokens do not divide over seq = {seq}: {way_out}")


def _nearest_latents(grid, patch, seq) -> str:
    """For each axis, the sizes below and above whose tokens divide over seq if the other axes stay."""
    sizes = []
    for name, n, p in zip(("frames", "rows", "columns"), grid, patch, strict=True):
        step = seq // math.gcd(seq, math.prod(grid) // n)
        near = [k * step * p for k in (n // step, n // step + 1) if k]
        sizes.append(f"{' or '.join(map(str, near))} {name} (now {n * p})")
    return ", ".join(sizes)


def current_mesh() -> AbstractMesh | None:
    """The mesh that jax traces under; None if there is none, or it has one device. ValueError if it is not ours."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return None
    if missing := {axis for axes in RULES.values() for axis in axes or ()} - {*mesh.axis_names}:
        raise ValueError(f"the mesh in use, {dict(mesh.shape)}, lacks {', '.join(sorted(missing))}: see make_mesh")
    return mesh


def activation_spec(names, shape, mesh) -> PartitionSpec:
    """The mesh axes of an activation, by RULES; names are those of its leading axes, the others stay whole.

    A batch that does not divide (a few samples drawn on many devices; training checks its own) is computed by all.
    """
    axes = (RULES[name] for name in names)
    return PartitionSpec(*(a if n % _size(a, mesh) == 0 else None for a, n in zip(axes, shape, strict=False)))


def split(x, *names):
    """x with its leading axes, of those names, over the mesh in use as RULES say, and the others whole; no mesh: x."""
    if (mesh := current_mesh()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(names, x.shape, mesh))


def gathered(x):
    """x whole on every device of the mesh in use: of a small array, so that no large one is moved to it."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


def _size(axes, mesh) -> int:
    """Devices along those mesh axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def batch_shards(mesh) -> int:
    """Parts into which a batch is split."""
    return _size(RULES["batch"], mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data × fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(names, shape, mesh: Mesh) -> PartitionSpec:
    """The mesh axes of an array by RULES; names are its logical axes.

    An axis that does not divide by its mesh axes stays whole if the array has at most LARGEST_WHOLE elements: a tiny
    model on a large mesh is replicated, not refused. Raises ValueError if it has more, for a name that RULES lacks and
    for a mesh axis that two axes of the array claim. mesh may be abstract.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise ValueError(f"logical axis {unknown[0]!r} is not in the table; known: {', '.join(RULES)}")
    axes = [RULES[name] for name in names]
    claimed = [mesh_axis for axis in axes if axis for mesh_axis in axis]
    if len(claimed) != len(set(claimed)):
        raise ValueError(f"logical axes {tuple(names)} of an array {tuple(shape)} claim a mesh axis twice: {claimed}")
    whole = [bool(axis) and size % _size(axis, mesh) != 0 for axis, size in zip(axes, shape, strict=True)]
    if any(whole) and math.prod(shape) > LARGEST_WHOLE:
        i = whole.index(True)
        devices = _size(axes[i], mesh)
        raise ValueError(
            f"{names[i]!r} of an array {tuple(shape)} with logical axes {tuple(names)} does not divide over the "
            f"{devices} devices of {' × '.join(axes[i])} in the mesh {dict(mesh.shape)}, and the array is too large to "
            f"be whole on each: set config.mesh so that {' × '.join(axes[i])} divides {shape[i]}, e.g. "
            f"{math.gcd(shape[i], devices)}, with the other devices along data"
        )
    return PartitionSpec(*(None if stays else axis for axis, stays in zip(axes, whole, strict=True)))


def state_sharding(abstract_state, mesh: Mesh):
    """Shardings of a state from the logical axes of its abstract, still boxed, leaves (jax.eval_shape of its init)."""

    def is_boxed(leaf):
        return isinstance(leaf, nn.Partitioned)

    def sharding(leaf):
        if not is_boxed(leaf):
            return replicated(mesh)  # counters
        return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))

    return jax.tree.map(sharding, abstract_state, is_leaf=is_boxed)
