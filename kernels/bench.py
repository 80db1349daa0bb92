"""Times flash_attention and weighs its memory against plain JAX differentiation of the jnp reference, in one run.

    python -m kernels.bench                                  # L = 8,192, one head; about a minute on two cores
    python -m kernels.bench --workload cpu_8192_cross --dtype bfloat16 --repeats 5 --json bench.json
    python -m kernels.bench --workload wan_1.3b --repeats 0  # compiled memory only: nothing is allocated or run

Three passes: forward; forward + tangent (jax.jvp, along q alone for cross-attention, whose text is constant);
forward + backward (jax.vjp, gradients of q, k and v).

- time: median wall time over the repeats. In every repeat each program runs once, one after another, so that whatever
  else loads the machine loads both sides alike: trust the ratios more than the seconds.
- memory: temp_size_in_bytes of XLA's memory analysis of the compiled program: the scratch space it allocates besides
  its arguments and its results. It is a property of the program, not a measurement of the process.

Ratios are plain / op: above 1 the op is better.
"""

import argparse
import json
import platform
import statistics
import time

import jax

from kernels import reference
from kernels.attention import flash_attention
from kernels.workloads import WORKLOADS


def passes(attend, cross):
    """{name: function of (q, k, v, dq, dk, dv, g)} for one attention function of (q, k, v)."""

    def forward(q, k, v, dq, dk, dv, g):
        return attend(q, k, v)

    def tangent(q, k, v, dq, dk, dv, g):
        if cross:
            return jax.jvp(lambda q: attend(q, k, v), (q,), (dq,))
        return jax.jvp(attend, (q, k, v), (dq, dk, dv))

    def backward(q, k, v, dq, dk, dv, g):
        o, pull_back = jax.vjp(attend, q, k, v)
        return o, pull_back(g)

    return {"forward": forward, "forward + tangent": tangent, "forward + backward": backward}


def compile_programs(workload, dtype, implementation):
    """({(side, pass): compiled program}, shapes of its arguments) with sides "plain" and "op"."""
    query = jax.ShapeDtypeStruct((workload.batch, workload.q_len, workload.heads, workload.head_dim), dtype)
    key = jax.ShapeDtypeStruct((workload.batch, workload.k_len, workload.heads, workload.head_dim), dtype)
    shapes = (query, key, key, query, key, key, query)
    sides = {
        "plain": reference.attention,
        "op": lambda q, k, v: flash_attention(q, k, v, implementation=implementation),
    }
    programs = {
        (side, name): jax.jit(function).lower(*shapes).compile()
        for side, attend in sides.items()
        for name, function in passes(attend, workload.cross).items()
    }
    return programs, shapes


def measure(programs, shapes, repeats):
    """{(side, pass): median seconds}, with the repeats interleaved; None for each where repeats is 0."""
    if repeats == 0:
        return dict.fromkeys(programs)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    args = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True)]
    seconds = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if repeat > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(workload, dtype, implementation, repeats):
    """The benchmark's result, a dict that JSON can hold: environment, workload and a row for each pass."""
    programs, shapes = compile_programs(workload, dtype, implementation)
    seconds = measure(programs, shapes, repeats)
    rows = []
    for name in passes(None, workload.cross):
        row = {"pass": name}
        for side in ("plain", "op"):
            row[f"{side}_seconds"] = seconds[side, name]
            row[f"{side}_temp_bytes"] = programs[side, name].memory_analysis().temp_size_in_bytes
        row["time_ratio"] = row["plain_seconds"] / row["op_seconds"] if repeats else None
        row["memory_ratio"] = row["plain_temp_bytes"] / max(row["op_temp_bytes"], 1)
        rows.append(row)
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "device": f"{device.device_kind} ({device.platform}), {platform.processor() or platform.machine()}",
        "workload": vars(workload),
        "dtype": dtype,
        "implementation": implementation,
        "repeats": repeats,
        "rows": rows,
    }


def show(result):
    """Prints a result as a table."""
    w = result["workload"]
    print(f"JAX {result['jax']} on {result['device']}")
    print(
        f"{w['name']}: batch {w['batch']}, {w['q_len']} queries, {w['k_len']} keys, {w['heads']} heads of "
        f"{w['head_dim']}, {result['dtype']}; implementation {result['implementation']}, {result['repeats']} repeats"
    )
    print(f"{'':20}{'median time, s':^27}{'compiled temp memory, MiB':^30}")
    print(f"{'':20}" + f"{'plain':>9}{'op':>9}{'ratio':>9}" + f"{'plain':>11}{'op':>10}{'ratio':>9}")
    for row in result["rows"]:
        times = [row["plain_seconds"], row["op_seconds"], row["time_ratio"]]
        plain, op = row["plain_temp_bytes"] / 2**20, row["op_temp_bytes"] / 2**20
        line = "".join(f"{'-':>9}" if x is None else f"{x:9.3f}" for x in times)
        print(f"{row['pass']:20}{line}{plain:11.1f}{op:10.1f}{row['memory_ratio']:9.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="cpu_8192")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--implementation", default="auto", help="a name that flash_attention knows")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each program; 0 compiles only")
    parser.add_argument("--json", metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    result = report(WORKLOADS[args.workload], args.dtype, args.implementation, args.repeats)
    show(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
