"""Checks every implementation that is there against `blockwise` in float32, times them, and says which is best.

    python -m kernels.check                          # on a CPU under a minute
    python -m kernels.check --dtype=bfloat16 --json=check.json

First a table of errors: each pass of each implementation, heads of 64 and 128, bfloat16 and float32, with a ragged end
and with text; on a GPU or TPU in more shapes, among them the length of Wan 14B. An error is the largest over
the cases, relative to the largest entry of an output (`kernels.accuracy`); "!" marks what is not to be used. Then the
times of `kernels.bench` on four heads of Wan 14B (on a CPU: one of 2,048 tokens), and for each pass the fastest of
those without an error. What a run does by itself (`kernels.choice`) is this check at its own sizes, without times.
"""

import argparse
import json
import math
from dataclasses import replace

import jax

from . import bench
from .accuracy import TILE, Case, findings
from .choice import CANDIDATES, in_words, settle
from .implementations import IMPLEMENTATIONS, KERNELS, PASSES
from .workloads import WORKLOADS

HEAD_SIZES = (64, 128)
DTYPES = ("bfloat16", "float32")
CASES = (Case(1000, 1000), Case(200, 512))
MORE = (Case(TILE // 2, TILE // 2), Case(37, 37), Case(1000, 512), Case(129, 77))  # where there is a GPU or TPU
LONG = (Case(32_760, 32_760), Case(32_760, 512))  # there, with one head: Wan 14B
# {pass: (what bench times for it, the passes that it takes)}
TIMED = {
    "value": (bench.FORWARD, ("value",)),
    "tangent": (bench.TANGENT, ("forward", "tangent")),
    "backward": (bench.BACKWARD, ("forward", "backward")),
}


def implementations(backend) -> list[str]:
    """The names that may run on a backend."""
    candidates = [each for names in CANDIDATES.get(backend, {}).values() for each in names]
    kernels = [*candidates, "fa4"] if backend == "gpu" else candidates
    return list(dict.fromkeys([*kernels, "blockwise", *([] if kernels else ["reference"])]))


def check(names, head_size, dtype, backend):
    """{(name, pass): (largest error, why it is not to be used or "")}."""
    pairs = [(what, name) for name in names for what in PASSES if IMPLEMENTATIONS[name].does(what)]
    found = findings(pairs, head_size, dtype, CASES)
    if backend in KERNELS:
        found |= findings(pairs, head_size, dtype, MORE) | findings(pairs, head_size, dtype, LONG, heads=1)
    result = {}
    for (what, name, case), finding in found.items():
        worst, why = result.get((name, what), (0.0, ""))
        error = finding.error if math.isnan(finding.error) else max(worst, finding.error)
        result[name, what] = (worst if math.isnan(worst) else error, why or finding.why_not(case, dtype))
    return result


def show(head_size, dtype, names, checked):
    """Prints the errors of one size of heads and dtype as a table, and under it why something is not to be used."""
    print(f"\nheads of {head_size}, {dtype}\n{'':12}" + "".join(f"{what:>12}" for what in PASSES))
    for name in names:
        cells = (_cell(*checked[name, what]) if (name, what) in checked else "-" for what in PASSES)
        print(f"{name:12}" + "".join(f"{cell:>12}" for cell in cells))
    reasons = {}
    for (name, what), (_, why) in checked.items():
        if why:
            reasons.setdefault((name, why), []).append(what)
    for (name, why), passes in reasons.items():
        print(f"! {name} ({', '.join(passes)}): {why}")


def _cell(error, why):
    return f"{'none' if math.isinf(error) else f'{error:.1e}'}{' !' if why else ''}"


def time_them(dtype, names, refused, repeats, backend):
    """Prints the times of bench, and for each pass the fastest that is not `refused`. Returns both for JSON."""
    workload = replace(WORKLOADS["wan_14b"], heads=4) if backend in KERNELS else WORKLOADS["cpu_2048"]
    asked = [name for name in names if all(map(IMPLEMENTATIONS[name].does, PASSES))]
    result = bench.report(workload, dtype, asked, repeats)
    bench.show(result)
    best = fastest(result["rows"], refused)
    print(f"fastest without an error: {in_words(best)}")
    print(f'"auto" takes here: {in_words(settle(workload.head_dim, dtype, workload.q_len))}')
    return result | {"fastest": best}


def fastest(rows, refused) -> dict[str, str]:
    """{pass: implementation} of the rows of bench; "forward" is timed as a part of the derivatives."""
    best = {}
    for what, (timed, parts) in TIMED.items():
        seconds = {
            row["side"]: row["seconds"]
            for row in rows
            if row["pass"] == timed and row["side"] in IMPLEMENTATIONS and row["seconds"]
            if not any((row["side"], part) in refused for part in parts)
        }
        if seconds:
            best[what] = min(seconds, key=lambda side: seconds[side])
    return best


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given again")
    parser.add_argument("--head_size", action="append", type=int, choices=HEAD_SIZES, help="may be given again")
    parser.add_argument("--repeats", type=int, default=3, help="timed samples of each program; 0: errors alone")
    parser.add_argument("--json", metavar="PATH", help="also write the results there")
    args = parser.parse_args(argv)
    where, backend = bench.environment(), jax.default_backend()
    print(f"JAX {where['jax']} on {where['device']}, {where['machine']}, Python {where['python']}, {where['date']}")
    names, tables, timed = implementations(backend), [], []
    for dtype in args.dtype or DTYPES:
        refused = set()
        for head_size in args.head_size or HEAD_SIZES:
            checked = check(names, head_size, dtype, backend)
            show(head_size, dtype, names, checked)
            refused |= {pair for pair, (_, why) in checked.items() if why}
            rows = [
                {"implementation": name, "pass": what, "error": error if math.isfinite(error) else None, "why_not": why}
                for (name, what), (error, why) in checked.items()
            ]
            tables.append({"head_size": head_size, "dtype": dtype, "rows": rows})
        if args.repeats:
            timed.append(time_them(dtype, names, refused, args.repeats, backend))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"environment": where, "errors": tables, "times": timed}, file, indent=2)


if __name__ == "__main__":
    main()
