"""What the TPU compiler makes of each attention kernel, cycle by cycle, on a machine without a TPU.

    pip install 'rcm-jax[tpu]' && python -m kernels.tpu_report           # v5e, v5p and v6e; some five minutes
    python -m kernels.tpu_report --chip v6e --dump /tmp/schedules        # keeps the compiler's files

libtpu's compiler writes the schedule that it will run: a line is a cycle, its columns the units in use. For a block of
1,024 queries × 1,024 keys at 128 features in bfloat16 the table says, for our kernels and, compiled in the same run,
for JAX's splash attention at its best block sizes:

- cycles: of one block, once the kernel runs: what a step of the grid always does, divided by the blocks of its tile,
  with what is done only before the first and after the last tile of a row spread over 32,768 keys (or queries).
- busy: share of the cycles in which the matrix units work. needed: share that the pass's products would take on
  units that never wait and waste nothing; a kernel that makes more products than needed has a lower one.
- vector, exp, store: the share of their slots that vector arithmetic, transcendentals and stores fill. One that is
  near 100 % bounds the kernel, wherever the matrix units are not.
- spills: vector registers stored for want of registers, a block.

Stalls on memory are not in a schedule: these are the compiler's numbers, no clock's.
"""

import argparse
import contextlib
import functools
import math
import os
import pathlib
import re
import tempfile
from importlib import metadata
from typing import NamedTuple

import numpy as np

BLOCK, FEATURES, TOKENS = 1024, 128, 32_768
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Multiply-adds a cycle: matrix units × width² × rows that each takes.
RATES = {"v5e": 4 * 128**2, "v5p": 4 * 128**2, "v6e": 2 * 256**2 * 2}
FORWARD, TANGENT, BOTH, BACKWARD = "forward", "tangent", "forward + tangent", "backward"
PRODUCTS = {FORWARD: 2, TANGENT: 5, BOTH: 6, BACKWARD: 5}
# Tiles and keys worked on at a time, of splash: the best of all that were tried on one of the chips.
SPLASH = {
    FORWARD: ((1024, 2048, 512), (2048, 2048, 256), (2048, 2048, 512)),
    BACKWARD: ((1024, 1024, 512), (1024, 2048, 512)),
}


class Schedule(NamedTuple):
    """The schedule of one kernel: `used` and `capacity` are by unit, `used` summed over the cycles of a step."""

    kernel: str
    step: float  # cycles of a step of the grid that makes products
    ends: float  # cycles besides, of the steps that begin or end a row of tiles
    used: dict[str, float]
    capacity: dict[str, int]

    def share(self, unit):
        """Of the unit's slots in a step."""
        return self.used[unit] / self.capacity[unit] / self.step


def schedules(folder: pathlib.Path, since=()) -> list[Schedule]:
    """Those of the kernels that libtpu wrote into `folder`, without the files named in `since`.

    Raises:
      ValueError: files that look otherwise than those of libtpu 0.0.42.
    """
    result = []
    for path in sorted(folder.glob("*pre-delay_hlo-static-per-bundle-utilization.txt")):
        name = re.match(r"(\d+-(attention_\w+|splash_\w+)[.\d]*)-\d+-", path.name)
        if name and path.name not in since:
            bundles = [x for x in folder.glob(f"{name[1]}-*-packed-bundles-post-ra.txt") if "analysis" not in x.name]
            if len(bundles) != 1:
                raise ValueError(f"{len(bundles)} schedules of {name[1]} in {folder}, not 1: clear it, and run again")
            result.append(_schedule(name[2], path.read_text(), bundles[0].read_text()))
    return result


def _schedule(kernel, utilization, bundles) -> Schedule:
    """From the text of the two files: the units in use in each cycle, and the bundles with their regions."""
    head, body = utilization.split("== UTILIZATION:\n")
    units, slots = (re.split(r"[,\s]+", line.strip()) for line in head.strip().splitlines()[-2:])
    rows = np.array([line.split() for line in body.splitlines() if line.strip()], int)
    loops, branches = _structure(bundles)
    if not loops or rows.shape[1] != len(units):
        raise ValueError(f"the schedule of {kernel} has {len(loops)} loops and {rows.shape[1]} columns: unknown format")
    times = np.ones(len(rows))
    (start, end, _), *inner = sorted(loops, key=lambda x: x[0] - x[1])  # the longest is the loop over the grid
    for a, b, trips in inner:
        times[a:b] *= trips
    used = rows * times[:, None]
    matrix = used[:, units.index("MXU")]
    ends = np.zeros(len(rows), bool)
    for a, b in branches:  # a branch without products is not taken in every step
        if start <= a and b <= end and not matrix[a:b].any():
            ends[a:b] = True
    inside = np.zeros(len(rows), bool)
    inside[start:end] = True
    step = inside & ~ends
    sums = dict(zip(units, used[step].sum(0), strict=True))
    return Schedule(
        kernel, times[step].sum(), times[inside & ends].sum(), sums, dict(zip(units, map(int, slots), strict=True))
    )


def _structure(bundles):
    """([(start, end, trips)] of loops, [(start, end)] of code that a branch skips), in bundles, which are cycles."""
    loops, branches, starts = [], [], []
    for bundle in re.split(r"\n(?= *0x)", bundles):
        found = re.match(r" *0x([0-9a-f]+) *(LB)?", bundle)
        if not found:
            continue
        at = int(found[1], 16)
        if found[2]:
            starts.append(at)
        if test := re.search(r"totalorder [^,]*, (\d+) /\* loop exit test", bundle):
            loops.append((starts.pop(), at + 1, int(test[1])))
        if target := re.search(r"sbr\.rel \(%\w+\) target bundleno = (\d+)", bundle):
            branches.append((at + 1, int(target[1])))
    return loops, branches


def ours(kind):
    """{pass: (function, shapes of its arguments, blocks of a tile)} of kernels.pallas_tpu for that kind of TPU."""
    import jax

    from . import pallas_tpu

    q = jax.ShapeDtypeStruct((1, 4 * 2048, 1, FEATURES), "bfloat16")
    o, lse = jax.ShapeDtypeStruct(q.shape, "float32"), jax.ShapeDtypeStruct((1, 1, q.shape[1]), "float32")
    scale = FEATURES**-0.5
    with pallas_tpu.compiling_for(kind):
        cuts = pallas_tpu.CUTS[pallas_tpu.matrix_width()]

    def steered(function):
        def run(*arrays):
            with pallas_tpu.compiling_for(kind):
                return function(*arrays)

        return run

    functions = {
        FORWARD: ("online", lambda q, k, v: pallas_tpu.forward(q, k, v, scale, True), (q, q, q)),
        TANGENT: ("tangent", functools.partial(pallas_tpu.tangent, scale=scale), (q, q, q, o, lse, q, q, q)),
        BOTH: ("fused", functools.partial(pallas_tpu.forward_tangent, scale=scale, wide=True), (q,) * 6),
        BACKWARD: (
            "backward",
            functools.partial(pallas_tpu.backward, live=(True, True, True), scale=scale),
            (q, q, q, o, lse, q),
        ),
    }
    return {
        name: (steered(f), args, math.prod(cuts[kernel][0]) / BLOCK**2) for name, (kernel, f, args) in functions.items()
    }


def splash(name, queries, keys, computed):
    """(function, shapes of its arguments) of JAX's splash attention, forward or fused backward, at these sizes."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length = 4 * 2048
    sizes = splash_attention_kernel.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=computed,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=computed,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))])
    make = functools.partial(
        splash_attention_kernel.make_splash_mha, mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    q = jax.ShapeDtypeStruct((1, length, FEATURES), "bfloat16")
    if name == FORWARD:
        return make(save_residuals=True), (q, q, q)
    return lambda q, k, v, g: jax.vjp(make(save_residuals=False), q, k, v)[1](g), (q, q, q, q)


def compiled(function, args, device, folder) -> list[Schedule]:
    """The schedules of the kernels of a function of arrays of these shapes, compiled for a device."""
    import jax
    from jax.sharding import SingleDeviceSharding

    before = {x.name for x in folder.iterdir()}
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in args)
    jax.jit(function).lower(*shapes).compile()
    made = schedules(folder, before)
    for path in folder.iterdir():  # 50 MB a kernel
        if path.name not in before and "utilization" not in path.name and "packed-bundles-post-ra" not in path.name:
            path.unlink()
    return made


def measured(chip, folder):
    """{(pass, side): (Schedule, blocks of a tile)} on a chip, ours and splash's best."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    rows = {}
    for name, (function, args, blocks) in ours(device.device_kind).items():
        (schedule,) = compiled(function, args, device, folder)
        rows[name, "ours"] = schedule, blocks
        if name not in SPLASH:
            continue
        tried = {}
        for sizes in SPLASH[name]:
            *_, schedule = compiled(*splash(name, *sizes), device, folder)
            tried["splash {}, {}, {}".format(*sizes)] = schedule, math.prod(sizes[:2]) / BLOCK**2
        best = min(tried, key=lambda side: cycles(*tried[side]))
        rows[name, best] = tried[best]
    return rows


def cycles(schedule, blocks):
    """Of one block."""
    return schedule.step / blocks + schedule.ends / (blocks**0.5 * TOKENS / BLOCK)


def show(chip, rows):
    """Prints the table of a chip."""
    print(f"\n{chip:40}cycles    busy  needed  vector     exp   store  spills")
    for (name, side), (schedule, blocks) in rows.items():
        each = cycles(schedule, blocks)
        least = PRODUCTS[name] * BLOCK * BLOCK * FEATURES / RATES[chip]
        shares = [schedule.share(unit) * schedule.step / blocks / each for unit in ("MXU", "VALU", "EUP", "VSTORE")]
        shares.insert(1, least / each)
        print(
            f"{name:19}{side:21}{each:6.0f}"
            + "".join(f"{x:8.0%}" for x in shares)
            + f"{schedule.used['VSTORE:SPILL'] / blocks:8.0f}"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=[*TOPOLOGIES], help="may be given again; all if left out")
    parser.add_argument("--dump", metavar="FOLDER", type=pathlib.Path, help="keep the schedules there")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = args.dump or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        # libtpu reads these when it is loaded, at the first topology. The limit is for splash, which asks for none.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_tpu_scoped_vmem_limit_kib=65536"
        )
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
        print(f"JAX {metadata.version('jax')}, libtpu {metadata.version('libtpu')}")
        for chip in args.chip or TOPOLOGIES:
            show(chip, measured(chip, folder))


if __name__ == "__main__":
    main()
