"""Times flash_attention and weighs its memory against plain JAX differentiation of the jnp reference, in one run.

    python -m kernels.bench                                  # L = 8,192, one head; about a minute on two cores
    python -m kernels.bench --workload cpu_8192_cross --dtype bfloat16 --repeats 5 --json bench.json
    python -m kernels.bench --workload wan_1.3b --repeats 0  # compiled memory only: nothing is allocated or run
    python -m kernels.bench --workload all --dtype bfloat16 --implementation auto --implementation triton  # on a GPU

Sides:
- plain: JAX's own differentiation of the jnp reference.
- blockwise, triton, …: flash_attention with each --implementation; "auto" appears as what it stands for here, where
  that is one for all passes.
- triton fused, pallas_tpu fused: the kernel that makes value and tangent in one pass, which is not in the op.
- Opponents, without being asked for. On an NVIDIA GPU cudnn, jax.nn.dot_product_attention(implementation="cudnn"),
  which has no forward mode, and fa4 where fa4-jax is installed; on a TPU splash, JAX's splash attention, which has no
  forward mode either.
A side that does not fit or does not run is left out, and its reason stands under the table.

Passes: forward; forward + tangent (jax.jvp, along q alone for cross-attention, whose text is constant); forward +
backward (jax.vjp, gradients of q, k and v).

Columns:
- ms: median wall time over the repeats. In every repeat each program runs once, one after another, so that whatever
  else loads the machine loads all sides alike: trust the ratios more than the times. On accelerators one sample is
  several runs, SAMPLE_SECONDS long; runs below 0.1 ms are still mostly the cost of starting a program.
- TFLOP/s: counted products / time, the same count for every side. A product is one of [queries, d] with [d, keys] or
  of [queries, keys] with [keys, d], 2·b·n·l·m·d operations, and the counts are those of separate kernels that keep
  o and lse: 2 forward (S = Q Kᵀ, P V); 5 more for the tangent (S again, Q̇ Kᵀ, Q K̇ᵀ, P V̇, H V), 3 more along q alone
  (S again, Q̇ Kᵀ, H V); 5 more backward (S again, G Vᵀ, and one each for dQ, dK, dV). A side may make another number:
  a fused kernel does not make S again, those of "triton" make S and G Vᵀ twice backward.
- of matmul: that rate / the rate of a square jnp matmul of the same dtype in this run, at JAX's default precision.
- temp MiB: temp_size_in_bytes of XLA's memory analysis of the compiled program: the scratch space it allocates besides
  its arguments and its results. It is a property of the program, not a measurement of the process.
- peak MiB, where the device tells: the most device memory in use so far, arguments and results included, after the
  first run of the program. "-" where an earlier program took more. Programs run in the order of their temp memory.
- × plain: plain / this side, above 1 this side is better.
"""

import argparse
import datetime
import functools
import json
import math
import platform
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import fa4, pallas_tpu, reference, splash, triton
from .accuracy import one_line
from .attention import choices, flash_attention, settle
from .implementations import KERNELS
from .reference import K, Q
from .workloads import REAL, WORKLOADS

FORWARD, TANGENT, BACKWARD = "forward", "forward + tangent", "forward + backward"
# {pass: products of self-attention, of cross-attention}
PRODUCTS = {FORWARD: (2, 2), TANGENT: (2 + 5, 2 + 3), BACKWARD: (2 + 5, 2 + 5)}
# {pass: float32 arrays [b, n, queries, keys] that plain holds at a time}, by XLA's analysis on CPU
SCORES = {FORWARD: 2, TANGENT: 4, BACKWARD: 4}
FUSED = {"triton": triton.forward_tangent, "pallas_tpu": pallas_tpu.forward_tangent}
HOMES: dict[str, str] = {name: backend for backend, name in KERNELS.items()} | {"fa4": "gpu"}
CPU_LIMIT = 8 * 2**30  # bytes of score arrays
SAMPLE_SECONDS, MOST_RUNS = 0.1, 50  # of one timed sample on an accelerator
MATMUL = ("matmul", "")


class Program(NamedTuple):
    """A compiled program with its arguments (none: it is not to be run)."""

    compiled: jax.stages.Compiled
    args: list

    @property
    def temp_bytes(self):
        return self.compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]

    def seconds(self, runs=1):
        """Wall time of one run, out of so many in a row."""
        start = time.perf_counter()
        for _ in range(runs):
            out = None  # gives its memory to the next
            out = self.compiled(*self.args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / runs


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

    return {FORWARD: forward, TANGENT: tangent, BACKWARD: backward}


def sides(names, cross, device):
    """{side: {pass: function of (q, k, v, dq, dk, dv, g)}} with a side for each implementation in `names`."""
    result = {"plain": passes(reference.attention, cross)}
    if "NVIDIA" in device.device_kind:
        result["cudnn"] = passes(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), cross)
        del result["cudnn"][TANGENT]
        names = dict.fromkeys([*names, "fa4"] if not fa4.missing() else names)
    if device.platform == "tpu":
        result["splash"] = passes(lambda q, k, v: splash.value(q, k, v, q.shape[-1] ** -0.5), cross)
        del result["splash"][TANGENT]
    for name in names:
        result[name] = passes(functools.partial(flash_attention, implementation=name), cross)
        if name in FUSED:
            result[f"{name} fused"] = {TANGENT: functools.partial(_fused, FUSED[name], cross)}
    return result


def _fused(forward_tangent, cross, q: Q, k: K, v: K, dq: Q, dk: K | None, dv: K | None, g: Q) -> tuple[Q, Q]:
    if cross:
        dk = dv = None
    o, _, do = forward_tangent(q, k, v, dq, dk, dv, q.shape[-1] ** -0.5)
    return o, do


def why_not(side, name, workload, device, run):
    """Why a pass of a side is not to be compiled for that device, or not to be `run` on it; else None."""
    home = HOMES.get(side.split()[0]) or device.platform
    if home != device.platform:
        return f"its kernels are for a {home.upper()}, and the device is a {device.platform.upper()}"
    if run and side in ("plain", "reference"):
        w = workload
        needed = 4 * SCORES[name] * w.batch * w.heads * w.q_len * w.k_len
        limit = (device.memory_stats() or {}).get("bytes_limit", CPU_LIMIT)
        if needed > limit:
            return f"its [queries, keys] arrays take {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}: try --heads"
    return None


def compile_all(workload, dtype, names, device, run, matmul_size):
    """({(side, pass): Program}, {(side, pass): why it is left out}); with MATMUL among the programs if they `run`."""
    query = jax.ShapeDtypeStruct((workload.batch, workload.q_len, workload.heads, workload.head_dim), dtype)
    key = jax.ShapeDtypeStruct((workload.batch, workload.k_len, workload.heads, workload.head_dim), dtype)
    shapes, args = (query, key, key, query, key, key, query), []
    programs, left_out = {}, {}
    if run:
        square = jax.ShapeDtypeStruct((matmul_size, matmul_size), dtype)
        *args, x, y = (_normal(i, shape) for i, shape in enumerate((*shapes, square, square)))
        programs[MATMUL] = Program(jax.jit(jnp.matmul).lower(x, y).compile(), [x, y])
    for side, functions in sides(names, workload.cross, device).items():
        for name, function in functions.items():
            reason = why_not(side, name, workload, device, run)
            if reason is None:
                try:
                    programs[side, name] = Program(jax.jit(function).lower(*shapes).compile(), args)
                except Exception as error:  # whatever a compiler raises: the other sides go on
                    reason = one_line(error)
            if reason is not None:
                left_out[side, name] = reason
    return programs, left_out


def _normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype)


def measure(programs, repeats, device):
    """({key: median seconds}, {key: peak bytes or None}, {key: why it did not run}), with the repeats interleaved."""
    runs, peaks, failed = {}, {}, {}
    for key, program in sorted(programs.items(), key=lambda item: item[1].temp_bytes):
        before = _peak(device)
        try:
            program.seconds()  # warms up
            runs[key] = 1 if device.platform == "cpu" else _runs(program.seconds())
        except Exception as error:  # out of memory, a kernel that cannot be started: the other sides go on
            failed[key] = one_line(error)
            continue
        after = _peak(device)
        peaks[key] = after if after and after > before else None
    seconds = {key: [] for key in programs if key in runs}
    for _ in range(repeats):
        for key, times in seconds.items():
            times.append(programs[key].seconds(runs[key]))
    return {key: statistics.median(times) for key, times in seconds.items()}, peaks, failed


def _runs(seconds):
    """How many runs make a sample."""
    return min(max(math.ceil(SAMPLE_SECONDS / seconds), 1), MOST_RUNS)


def _peak(device):
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def report(workload, dtype, names, repeats, matmul_size=None):
    """The result on one workload, a dict that JSON can hold: a row for each pass and side, and what was left out."""
    device = jax.devices()[0]
    matmul_size = matmul_size or (2048 if device.platform == "cpu" else 8192)
    names = list(dict.fromkeys(_stands_for(name, workload, dtype) for name in names))
    programs, left_out = compile_all(workload, dtype, names, device, repeats > 0, matmul_size)
    seconds, peaks, failed = measure(programs, repeats, device) if repeats else ({}, {}, {})
    left_out |= failed
    rate = 2 * matmul_size**3 / seconds[MATMUL] / 1e12 if MATMUL in seconds else None
    product = 2 * workload.batch * workload.heads * workload.q_len * workload.k_len * workload.head_dim
    rows = []
    for name, counts in PRODUCTS.items():
        plain = programs.get(("plain", name)) if ("plain", name) not in failed else None
        for side, program in ((s, p) for (s, n), p in programs.items() if n == name and (s, n) not in failed):
            time_taken, flops = seconds.get((side, name)), counts[workload.cross] * product
            tflops = flops / time_taken / 1e12 if time_taken else None
            rows.append(
                {
                    "pass": name,
                    "side": side,
                    "products": counts[workload.cross],
                    "seconds": time_taken,
                    "tflops": tflops,
                    "of_matmul": tflops / rate if tflops and rate else None,
                    "time_ratio": seconds["plain", name] / time_taken if plain and time_taken else None,
                    "temp_bytes": program.temp_bytes,
                    "memory_ratio": plain.temp_bytes / max(program.temp_bytes, 1) if plain else None,
                    "peak_bytes": peaks.get((side, name)),
                }
            )
    return {
        "workload": vars(workload),
        "dtype": dtype,
        "repeats": repeats,
        "matmul": {"size": matmul_size, "tflops": rate},
        "rows": rows,
        "left_out": [{"side": s, "pass": n, "reason": reason} for (s, n), reason in left_out.items()],
    }


def _stands_for(name, workload, dtype):
    """What "auto" is, if it is one for all passes."""
    if name != "auto":
        return name
    chosen = set(settle(workload.head_dim, dtype, workload.q_len).values())
    return chosen.pop() if len(chosen) == 1 else name


def environment():
    """Where a result comes from."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{device.device_kind} ({device.platform})",
        "machine": platform.processor() or platform.machine(),
    }


COLUMNS = {  # heading: (key of a row, factor, format)
    "ms": ("seconds", 1e3, "10.4g"),
    "TFLOP/s": ("tflops", 1, "10.4g"),
    "of matmul": ("of_matmul", 1, "11.3f"),
    "× plain": ("time_ratio", 1, "9.2f"),
    "temp MiB": ("temp_bytes", 2**-20, "11.1f"),
    " × plain": ("memory_ratio", 1, "9.1f"),
    "peak MiB": ("peak_bytes", 2**-20, "11.1f"),
}


def show(result):
    """Prints a result as a table."""
    w, matmul = result["workload"], result["matmul"]
    print(
        f"\n{w['name']}: batch {w['batch']}, {w['q_len']} queries, {w['k_len']} keys, {w['heads']} heads of "
        f"{w['head_dim']}, {result['dtype']}, {result['repeats']} repeats"
    )
    if matmul["tflops"]:
        print(f"matmul of {matmul['size']}×{matmul['size']}: {matmul['tflops']:.4g} TFLOP/s")
    used = {head: x for head, x in COLUMNS.items() if any(row[x[0]] is not None for row in result["rows"])}
    widths = {head: int(form.split(".")[0]) for head, (_, _, form) in used.items()}
    print(f"{'':20}{'':18}" + "".join(f"{head:>{width}}" for head, width in widths.items()))
    for row in result["rows"]:
        cells = (
            f"{'-':>{widths[head]}}" if row[key] is None else f"{row[key] * factor:{form}}"
            for head, (key, factor, form) in used.items()
        )
        print(f"{row['pass']:20}{row['side']:18}" + "".join(cells))
    grouped = {}
    for x in result["left_out"]:
        grouped.setdefault((x["side"], x["reason"]), []).append(x["pass"])
    for (side, reason), names in grouped.items():
        print(f"left out: {side} ({', '.join(names)}): {reason}")


def _at_least(least, text):
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def arguments(argv=None):
    """The parsed command line; its workloads are Workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload", action="append", choices=[*sorted(WORKLOADS), "all"], help="may be given again; all: real ones"
    )
    parser.add_argument("--heads", type=functools.partial(_at_least, 1), help="run on no more heads than this")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--implementation", action="append", choices=choices(), help="may be given again")
    parser.add_argument(
        "--repeats",
        type=functools.partial(_at_least, 0),
        default=3,
        help="timed samples of each program; 0 compiles only",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the results there, after each workload")
    args = parser.parse_args(argv)
    names = [x for name in args.workload or ["cpu_8192"] for x in (REAL if name == "all" else [name])]
    args.workload = [WORKLOADS[name] for name in dict.fromkeys(names)]
    return args


def main(argv=None):
    args = arguments(argv)
    where, results = environment(), []
    print(f"JAX {where['jax']} on {where['device']}, {where['machine']}, Python {where['python']}, {where['date']}")
    for whole in args.workload:
        workload = replace(whole, heads=min(whole.heads, args.heads or whole.heads))
        result = report(workload, args.dtype, args.implementation or ["auto"], args.repeats)
        show(result)
        if workload != whole:
            print(f"note: {workload.heads} of {whole.heads} heads")
        results.append(result)
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"environment": where, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
