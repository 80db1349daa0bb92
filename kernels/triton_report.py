"""Compiles the Triton kernels for GPUs that need not be there, and tells what each takes of one.

    python -m kernels.triton_report      # every kernel, for compute capability 8.0 and 9.0, 64 and 128 features
    python -m kernels.triton_report --capability 86 --dtype float32

First what a kernel takes:
- registers: of one thread, of 255. spills: bytes that a thread keeps in memory for want of registers: 0 is wanted.
- shared: KiB of shared memory of one program, which must fit the GPU's.
- wgmma: the number of Hopper's asynchronous matrix instructions in the PTX, none before 9.0.

Then what one step of its loop over tiles is made of (`kernels.triton_sass`):
- instructions of a warp by kind.
- cycles of a multiprocessor for 128 queries and 128 keys, of its matrix units, of the unit of exp2 and conversions, and
  of the schedulers that issue instructions: an H100's for 9.0, an A100's for 8.0. Each is a bound by itself.
- peak: the share of the peak of matrix products that is left if the three go on at the same time, and if matrix
  products wait for the slower of the other two. Products that warps make twice count as work. A bound, not a time.

"official, …" is our forward_tangent in tiles that the official kernel tries (NVlabs/rcm at 20207e5, its
flash_attention_jvp_triton.py: 64 or 128 queries, 16 to 64 keys, 4 or 8 warps, 3 to 7 stages). That kernel too makes O
and Ȯ in one pass with 6 products, but it keeps three sums of [queries, features] where ours keeps two.
"""

import argparse
import datetime
import importlib.metadata
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import jax

from . import triton as attention
from . import triton_sass
from .workloads import WORKLOADS

SHARED_KIB = {"sm80": 99, "sm90": 227}  # the most that one program may have, 163 on an A100
COLUMNS = ("registers", "spills", "shared", "wgmma")
Shape: Any = jax.ShapeDtypeStruct  # stands for an array: launches look at nothing else
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What is compiled for every head size: {row of the table: (self-attention?, live tangents or gradients)}.
CASES = {
    "forward": (True, None),
    "forward_tangent": (True, (True, True, True)),
    "forward_tangent, text": (False, (True, False, False)),
    "tangent": (True, (True, True, True)),
    "tangent, text": (False, (True, False, False)),
    "backward": (True, (True, True, True)),
}


# Tiles that the official kernel tries, each of so many queries with as many keys as fit, and one size above.
OFFICIAL = [attention.Config(*x) for x in ((64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3))]
PAIRS = 128 * 128  # of a query and a key, to compare tiles of different sizes by


class Row(NamedTuple):
    """One kernel, compiled."""

    name: str
    config: attention.Config
    registers: int
    spills: int
    shared: float
    wgmma: int
    step: triton_sass.Step | None


def launches(workload, dtype, mask=None):
    """{row of the table: Launch} of all kernels at the shapes of a self-attention workload, masked, and of its text."""
    text = WORKLOADS[f"{workload.name}_cross"]
    result = {}
    for name, (alone, live) in CASES.items():
        query = Shape((workload.batch, workload.q_len, workload.heads, workload.head_dim), dtype)
        length = workload.k_len if alone else text.k_len
        key = Shape((workload.batch, length, workload.heads, workload.head_dim), dtype)
        lse = Shape((workload.batch, workload.heads, workload.q_len), "float32")
        o = Shape(query.shape, "float32")
        tangents = [x if alive else None for x, alive in zip((query, key, key), live or [False] * 3, strict=True)]
        recorded, rest = [], dict(scale=0.1, mask=mask if alone else None)

        def record(launch, recorded=recorded):
            recorded.append(launch)
            return launch.outputs

        if name.startswith("forward"):
            attention.forward_tangent(query, key, key, *tangents, **rest, launch=record)
        elif name.startswith("tangent"):
            attention.tangent(query, key, key, o, lse, *tangents, **rest, launch=record)
        else:
            attention.backward(query, key, key, o, lse, query, live, **rest, launch=record)
        result.update({launch.kernel if name == "backward" else name: launch for launch in recorded})
    return result


def compile_launch(name, launch, capability, config=None):
    """The Row of a launch compiled for a compute capability, in its own configuration or another."""
    import triton.knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    config = config or attention.configuration(launch, capability)
    constants = launch.all_constants(config)
    arrays = [f"*{TYPES[str(x.dtype)]}" for x in (*launch.arrays, *launch.outputs)]
    signature = dict(zip(kernel.arg_names, arrays, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(x),): y for x, y in constants.items()}, aligned)
    options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)  # what jax-triton asks for
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # jax-triton has set it to nothing
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = assemble(ptx, capability)
    step = triton_sass.main_loop(disassemble(compiled.asm["cubin"]))
    return Row(name, config, registers, spills, compiled.metadata.shared / 1024, ptx.count("wgmma.mma_async"), step)


def assemble(ptx, capability):
    """(registers, bytes of spills) of a thread, from ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", log))
    return int(re.findall(r"Used (\d+) registers", log)[0]), spills


def disassemble(cubin):
    """Machine code as text."""
    import triton.knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def report(capability, workload, dtype, mask=None):
    """A Row for each kernel."""
    return [compile_launch(name, x, capability) for name, x in launches(WORKLOADS[workload], dtype, mask).items()]


def official(capability, workload, dtype):
    """A Row for each of OFFICIAL."""
    launch = launches(WORKLOADS[workload], dtype)["forward_tangent"]
    return [compile_launch(f"official, {x.queries} × {x.keys}", launch, capability, x) for x in OFFICIAL]


def table_of_resources(rows):
    """Lines."""
    yield f"{'':24}{'queries, keys, warps, stages':>30}" + "".join(f"{x:>11}" for x in COLUMNS)
    for row in rows:
        config = ", ".join(map(str, row.config))
        yield f"{row.name:24}{config:>30}{row.registers:11}{row.spills:11}{row.shared:11.1f}{row.wgmma:11}"


def table_of_steps(rows, gpu):
    """Lines, for the rows that have a loop."""
    kinds, bounds = (*triton_sass.KINDS, "other"), ("matmul", "special", "issue")
    yield f"{'':22}{'instructions of a warp':>{8 * len(kinds)}}{'cycles of 128 × 128':>24}"
    yield f"{'':22}" + "".join(f"{x:>8}" for x in (*kinds, *bounds)) + f"{'of peak':>12}"
    for row in rows:
        if row.step is not None:
            tiles = PAIRS / (row.config.queries * row.config.keys)
            cycles = {name: tiles * x for name, x in row.step.cycles(gpu, row.config.warps).items()}
            best = cycles["matmul"] / max(cycles.values())
            in_turn = cycles["matmul"] / (cycles["matmul"] + max(cycles["special"], cycles["issue"]))
            counts = "".join(f"{row.step.kinds[x]:8}" for x in kinds) + "".join(f"{cycles[x]:8.0f}" for x in bounds)
            yield f"{row.name:22}{counts}{f'{in_turn:.0%}-{best:.0%}':>12}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", help="80 for 8.0; may be given again")
    parser.add_argument("--workload", action="append", choices=[x for x, w in WORKLOADS.items() if not w.cross])
    parser.add_argument("--dtype", choices=attention.DTYPES, default="bfloat16")
    args = parser.parse_args()
    print(f"Triton {importlib.metadata.version('triton')}, {datetime.date.today()}\n")
    for capability in args.capability or (80, 90):
        gpu = attention.gpu_of(capability)
        for workload in args.workload or ("cosmos_0.6b", "wan_14b"):
            most = SHARED_KIB[gpu]
            print(f"compute capability {capability / 10}, {workload}, {args.dtype}, at most {most} KiB shared")
            rows = report(capability, workload, args.dtype) + official(capability, workload, args.dtype)
            print(*table_of_resources(rows), "", *table_of_steps(rows, gpu), "", sep="\n")


if __name__ == "__main__":
    main()
