"""What a run needs, before a cluster is booked: its programs are compiled here for chips that are not.

    python scripts/plan.py --config=wan_14b.py --topology=v5p:4x4x8 [--config.mesh.fsdp=16 --config.mesh.seq=8]
    python scripts/plan.py --config=cosmos_14b.py --topology=h100:8x8 [--sweep]
    python scripts/plan.py --config=wan_14b.py --topology=h100:8x8 --topology=h100:16x8 --out=curve.png

No accelerator, data, teacher or much memory is needed; TPUs (v5e, v5p, v6e) need libtpu, GPUs (h100, h200: hosts ×
GPUs of each) JAX's CUDA plugin, without the CUDA libraries that it would bring. VERSION is that of jax:

    pip install 'rcm-jax[tpu]'
    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION

Lines marked "compiled" are facts of the compiled program; "estimate" is a roofline: what runs may be slower, and by
much. What does not fit is compiled again with cheaper and dearer changes until one does, and its flags are named;
Ctrl-C ends that. --sweep compiles every mesh and remat policy that divides, minutes for each, and ranks them. Several
topologies make a table, a line for each, and --out draws it. A student step for TPUs compiles for minutes;
--optimization=O0 is several times quicker, and its memory and schedule may differ.
"""

import common  # noqa: I001  (puts the checkout on the path)
import os
import re

# Only compilers are wanted: no search for TPUs on the network, no lock that another plan holds, no commentary.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402
from absl import flags  # noqa: E402

from rcm_jax.plan import remedy, report, sweep, topologies  # noqa: E402
from rcm_jax.plan.program import prepare  # noqa: E402
from rcm_jax.util.files import check_writable  # noqa: E402

CONFIG = common.config_flag()
TOPOLOGY = flags.DEFINE_multi_string(
    "topology", None, "Chips: v5p:4x4x8, v6e:16x16, h100:8x8 (hosts × GPUs of each), cpu:8. Several make a table."
)
PER_CHIP = flags.DEFINE_integer("batch_per_chip", None, "With a batch of so many for each chip.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "A PNG file: the table of several topologies, drawn.")
OVERWRITE = common.overwrite_flag()
SWEEP = flags.DEFINE_bool("sweep", False, "Try all meshes and remat policies that divide, and rank them.")
REMAT = flags.DEFINE_multi_enum("remat", sweep.REMATS, sweep.REMATS, "The remat policies of --sweep.")
LEVEL = flags.DEFINE_enum(
    "optimization", None, ["O0", "O1", "O2", "O3"], "XLA's: O0 compiles faster, to a program other than the run's."
)
flags.mark_flags_as_required(["config", "topology"])


def main():
    """Compiles, and prints what is needed."""
    counts = [int(t.partition(":")[2]) for t in TOPOLOGY.value if re.fullmatch(r"cpu:[1-9]\d*", t)]
    if counts:
        jax.config.update("jax_num_cpu_devices", max(counts))
    if LEVEL.value:
        jax.config.update("jax_optimization_level", LEVEL.value)
    several = len(TOPOLOGY.value) > 1
    if OUT.value and not (several and OUT.value.endswith(".png")):
        raise ValueError("--out draws a table: give --topology several times, and a name that ends in .png")
    if OUT.value:
        check_writable(OUT.value, OVERWRITE.value)
    if (PER_CHIP.value and not several) or (SWEEP.value and several):
        raise ValueError("--batch_per_chip is for several topologies, --sweep for one")
    run = common.experiment(CONFIG)
    if several:
        compare(run)
        return
    [topology] = TOPOLOGY.value
    chip, devices = topologies.devices(topology)
    if SWEEP.value:
        try_all(run, chip, devices)
        return
    programs = prepare(run, chip, devices)
    print(report.head(programs, chip, topology), flush=True)
    planned = {}
    for name, one in report.plan(programs, chip) if programs.held <= chip.hbm else ():
        planned[name] = one
        print(report.describe(name, one, chip), flush=True)
    print(report.summary(programs, planned, chip), flush=True)
    if not planned or not all(report.fits(one, chip) for one in planned.values()):
        mend(run, programs, planned, chip, devices)


def mend(run, programs, planned, chip, devices):
    """Prints every change as it is tried, and what the first that fits needs."""
    attempts = []
    print("what would:", flush=True)
    for attempt in remedy.search(run, programs, planned, chip, devices):
        attempts.append(attempt)
        print(remedy.line(run, attempt), flush=True)
    print(remedy.verdict(run, programs, attempts, chip))


def try_all(run, chip, devices):
    """Prints every candidate as it is done, and at the end, or when it is stopped, those so far by rank."""
    rows = []
    try:
        for row in sweep.sweep(run, chip, devices, REMAT.value):
            rows.append(row)
            print(f"{len(rows)}: {row.mesh} {row.remat}: {row.words}", flush=True)
    finally:
        print(sweep.table(rows))


def compare(run):
    """Prints a line for each topology, and draws them."""
    print(f"{sweep.HEAD}\n|{'---|' * (sweep.HEAD.count('|') - 1)}", flush=True)
    rows = []
    for topology, row in sweep.scale(run, TOPOLOGY.value, PER_CHIP.value):
        rows.append((topology, row))
        print(sweep.line(topology, row), flush=True)
    if OUT.value:
        sweep.draw(rows, OUT.value)


if __name__ == "__main__":
    common.run(main)
