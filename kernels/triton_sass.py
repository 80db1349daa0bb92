"""What one step of a compiled kernel's main loop is made of, read off its machine code, and the time it takes at least.

The loop goes over tiles, and a kernel spends its time there. Its instructions are counted by kind, without those that
lie behind a branch inside the loop (what only tiles at an edge do). Three parts of a multiprocessor bound a step from
below, each by itself:

- matmul: the matrix units, at the rate that the makers' peak is made of: an H100's 989.4 TFLOP/s in bfloat16 are 4,096
  operations a cycle of each of its 132 multiprocessors at 1.83 GHz, an A100's 312 are 2,048 of 108 at 1.41 GHz.
- special: exp2, and conversions one number at a time (F2F; pairs, F2FP, go elsewhere): 16 a cycle. That both share one
  unit is what Nvidia's profiler says of its XU.
- issue: four schedulers that issue an instruction of a warp each, every cycle. All kinds count, matrix products too.

What the three do at the same time, and what memory adds, a machine code does not tell. So these are bounds, not times.
"""

import re
from collections import Counter
from typing import NamedTuple

# Opcodes by kind; what is not listed is "other": addresses, indices, predicates, packing.
KINDS = {
    "matmul": "HGMMA HMMA",
    "exp2": "MUFU",
    "convert": "F2F I2F F2I",
    "float": "FFMA FADD FMUL FMNMX FSEL FSETP",
    "load": "LDG LDGSTS LDS LDSM LD STS STG ST UTMALDG",
    "sync": "BAR DEPBAR LDGDEPBAR MEMBAR FENCE WARPGROUP WARPSYNC SYNCS BSSY BSYNC",
}
KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}
MATMUL_RATE = {"sm80": 2048, "sm90": 4096}  # operations a cycle: A100, H100
SPECIAL_RATE, SCHEDULERS, WARP = 16, 4, 32
# `/*0a10*/ @!P0 BRA `(.L_x_0) ;` and HGMMA.64x128x16.F32.BF16, HMMA.16816.F32.BF16
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)(\S*)(.*);")
LABEL, TARGET = re.compile(r"(\.L_\w+):"), re.compile(r"\((\.L_\w+)\)")
WGMMA, MMA = re.compile(r"\.(\d+)x(\d+)x(\d+)"), {".1688": (16, 8, 8), ".16816": (16, 8, 16)}


class Step(NamedTuple):
    """One step of a loop: instructions of a warp by kind, and operations of a warp's matrix products."""

    kinds: Counter
    operations: float

    def cycles(self, gpu, warps):
        """Those that a multiprocessor takes at least for all warps of a program: {"matmul", "special", "issue"}."""
        special = self.kinds["exp2"] + self.kinds["convert"]
        return {
            "matmul": warps * self.operations / MATMUL_RATE[gpu],
            "special": warps * special * WARP / SPECIAL_RATE,
            "issue": warps * self.kinds.total() / SCHEDULERS,
        }


def main_loop(sass: str) -> Step | None:
    """The Step of the loop with the most matrix products in what nvdisasm prints; None without such a loop."""
    code, labels = [], {}
    for line in sass.splitlines():
        if match := LABEL.match(line.strip()):
            labels[match[1]] = len(code)
        elif match := INSTRUCTION.search(line):
            code.append(match.groups())
    jumps = [(at, labels[match[1]]) for at, x in enumerate(code) if x[0] == "BRA" and (match := TARGET.search(x[2]))]
    loops = [range(to, at + 1) for at, to in jumps if to <= at]
    loop = max(loops, key=lambda x: (sum(_operations(code[i]) for i in x), -len(x)), default=range(0))
    skipped = {i for at, to in jumps if at in loop and at < to <= loop[-1] for i in range(at + 1, to)}
    body = [code[i] for i in loop if i not in skipped or _operations(code[i])]
    operations = sum(map(_operations, body))
    return Step(Counter(KIND_OF.get(x[0], "other") for x in body), operations) if operations else None


def _operations(instruction):
    """Those of a warp, a quarter of those of a warp group."""
    opcode, suffix, _ = instruction
    if opcode == "HGMMA":
        m, n, k = map(int, WGMMA.findall(suffix)[0])
        return 2 * m * n * k / 4
    if opcode == "HMMA":
        m, n, k = next(size for name, size in MMA.items() if suffix.startswith(f"{name}."))
        return 2 * m * n * k
    return 0
