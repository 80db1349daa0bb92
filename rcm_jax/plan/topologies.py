"""Topologies of accelerators that are not here: devices to compile for, and how long they exchange at least."""

import math
import pathlib
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from rcm_jax.parallel.chips import CHIPS, Chip
from rcm_jax.parallel.hlo import Collective
from rcm_jax.util.extras import installed

TPU_HELP = "pip install 'rcm-jax[tpu]'"
GPU_HELP = f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"


def devices(topology: str) -> tuple[Chip, Sequence]:
    """Of "v5p:4x4x8" (chips along each axis), "h100:8x8" (hosts × GPUs of each) or "cpu:8" (devices that are here).

    ValueError for a topology that is not known, and where what compiles for it is not installed.
    """
    name, _, sizes = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(
            f"topology {topology!r} is none of CHIP:SIZES, such as v5p:4x4x8, v6e:16x16, h100:8x8 (hosts × GPUs of "
            f"each); chips: {', '.join(CHIPS)}"
        )
    chip, count = CHIPS[name], math.prod(int(size) for size in sizes.split("x"))
    found = {"tpu": _tpus, "gpu": _gpus, "cpu": _cpus}[chip.platform](chip, topology, sizes)
    if len(found) != count:
        raise ValueError(f"topology {topology!r} should have {count} chips, and {len(found)} were found")
    return chip, found


def _tpus(chip, topology, sizes):
    if not installed("libtpu"):
        raise ValueError(f"compiling for {topology} needs libtpu, no TPU: {TPU_HELP}")
    return _describe(topology, "tpu", topology_name=topology)


def _gpus(chip, topology, sizes):
    if not installed("jax_plugins.xla_cuda12"):
        raise ValueError(f"compiling for {topology} needs JAX's CUDA plugin, no GPU: {GPU_HELP}")
    if not re.fullmatch(rf"\d+x[1-{chip.host}]", sizes):
        raise ValueError(f"topology {topology!r} must be hosts × GPUs, 1 to {chip.host} of each, such as h100:8x8")
    target = pathlib.Path(__file__).with_name(chip.target).read_text()
    return _describe(topology, "cuda", topology_name=topology, topology=f"1x{sizes}", target_config=target)


def _cpus(chip, topology, sizes):
    if int(sizes) > len(jax.devices("cpu")):
        raise ValueError(
            f"{topology} asks for more than the {len(jax.devices('cpu'))} devices there are: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={sizes}"
        )
    return jax.devices("cpu")[: int(sizes)]


def _describe(asked, platform, **options):
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except (RuntimeError, NotImplementedError) as error:  # the plugin's own, such as a shape that no slice has
        raise ValueError(f"topology {asked!r}: {error}") from error


# Bytes that a chip must receive, as multiples of its operand, in a group of n.
SHARE = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: n > 1,
}


def moved(collective: Collective) -> float:
    """Bytes that a chip receives in one run."""
    return collective.size * SHARE[collective.kind](max(len(collective.group), 1))


def seconds(chip: Chip, collective: Collective) -> float:
    """At least, in one run: all links busy, or the network between hosts, which gets what hosts have summed already."""
    time = moved(collective) / chip.link
    hosts = len({device // chip.host for device in collective.group}) if chip.host else 1
    if hosts > 1:
        summed = collective.kind in ("reduce-scatter", "all-reduce")
        beside = len(collective.group) / hosts if summed else 1
        time = max(time, collective.size * SHARE[collective.kind](hosts) / beside / chip.network)
    return time
