"""What the text of a compiled program says of one chip: products, buffers written, collectives. Pure functions on text.

Whatever stands in a loop counts as often as the loop runs: by its known_trip_count where XLA wrote one (GPU, CPU), else
by the one constant that its condition compares with (TPU; loops of jax.lax.scan count from 0 by 1). A loop that has
neither, as that of a rollout of traced length, counts as often as the caller says.
"""

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others end in their width: f32, s8, f8e4m3fn
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What writes no buffer of its own: names for others' buffers, calls whose bodies are counted, halves of a pair.
NO_BUFFER = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "copy-done",
}
NO_WORK = {"AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}  # custom calls

INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of HLO; shape and rest (operands and attributes) as they are written."""

    name: str
    shape: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    def attribute(self, name: str, pattern: str = r"%?([\w.-]+)") -> Any:
        found = re.search(rf"\b{name}={pattern}", self.rest)
        return found[1] if found else None


Module = dict[str, dict[str, Instruction]]  # computation -> name -> instruction; the entry's key is ""


class Collective(NamedTuple):
    """A collective of one chip: bytes of its operands, the devices of the first group, how often it runs in a step."""

    kind: str
    size: int
    group: tuple[int, ...]
    times: float


class Buffer(NamedTuple):
    """An array that the program writes to memory, and where it comes from."""

    size: int
    shape: str
    source: str


class Work(NamedTuple):
    """One run of a program on one chip."""

    flops: float  # of matrix products and convolutions, 2 for a multiplication and an addition
    written: float  # bytes of all buffers that are written
    collectives: tuple[Collective, ...]
    largest: tuple[Buffer, ...]
    kernels: dict[str, float]  # custom calls that do not say what they cost: name -> how often
    open_loops: int  # whose trip count is not in the program


def read(text: str, open_trips: float = 1.0) -> Work:
    """The work of a program as `compiled.as_text()` gives it; open_trips: mean trips of a loop of unknown length."""
    module = parse(text)
    everyone = tuple(range(int((re.search(r"num_partitions=(\d+)", text) or "01")[1])))
    flops = written = 0.0
    collectives, buffers, kernels, open_loops = [], {}, {}, 0
    for scope, instruction, times, fused in walk(module, open_trips):
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            size = sum(_size(scope[name].shape) for name in instruction.operands)
            collectives.append(Collective(kind, size, group(instruction) or everyone, times))
        elif kind == "custom-call":
            target = instruction.attribute("custom_call_target", '"([^"]+)"')
            cost = _call_flops(scope, instruction, target)
            flops += times * (cost or 0)
            if cost is None and target not in NO_WORK:
                kernels[target] = kernels.get(target, 0) + times
        elif kind in FLOPS:
            flops += times * FLOPS[kind](scope, instruction)
        elif kind == "while":
            open_loops += _trips(module, instruction) is None
        if not fused and writes(instruction):
            written += times * _written(module, scope, instruction)
            for shape, size in _arrays(instruction.shape):
                buffers.setdefault(shape, Buffer(size, shape, instruction.attribute("op_name", '"([^"]*)"') or ""))
    largest = tuple(sorted(buffers.values(), key=lambda buffer: -buffer.size)[:3])
    return Work(flops, written, tuple(collectives), largest, kernels, open_loops)


def parse(text: str) -> Module:
    """Computations by name."""
    module, scope = {}, {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = "" if line.startswith("ENTRY") else re.findall(r"%?([\w.-]+)", line)[0]
            scope = module[name] = {}
        elif found := INSTRUCTION.match(line):
            root, name, shape, op, rest = found.groups()
            scope[name] = Instruction(name, shape, op, rest, bool(root))
    if "" not in module:
        raise ValueError("no entry computation found: this is not the text of a compiled program")
    return module


def walk(module: Module, open_trips: float, name: str = "", times: float = 1.0, fused: bool = False) -> Iterator:
    """(computation, instruction, how often it runs, whether inside a fusion) of all that an entry leads to."""
    for instruction in module[name].values():
        yield module[name], instruction, times, fused
        inside = functools.partial(walk, module, open_trips)
        if instruction.op == "while":
            trips = _trips(module, instruction)
            yield from inside(instruction.attribute("body"), times * (open_trips if trips is None else trips), fused)
        elif instruction.op == "conditional":  # all branches: which one runs is not known
            branches = re.findall(r"%([\w.-]+)", instruction.attribute("branch_computations", r"\{([^}]*)\}") or "")
            two = [instruction.attribute(f"{which}_computation") for which in ("true", "false")]
            for branch in branches or two:
                yield from inside(branch, times, fused)
        elif instruction.op in ("fusion", "async-start"):
            yield from inside(instruction.attribute("calls"), times, instruction.op == "fusion" or fused)
        elif instruction.op == "call":
            yield from inside(instruction.attribute("to_apply"), times, fused)


def _trips(module: Module, loop: Instruction) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = module[loop.attribute("condition")].values()
    limits = [
        re.match(r"\d+", i.rest) for i in condition if i.op == "constant" and i.shape.startswith(("s32[]", "u32[]"))
    ]
    return int(limits[0][0]) if len(limits) == 1 and limits[0] else None


def _arrays(shape: str) -> list[tuple[str, int]]:
    """(dtype[sizes], bytes) of a shape's arrays in main memory: S(1) and later in a layout are other memories."""
    found = []
    for dtype, sizes, layout in ARRAY.findall(shape):
        if not re.search(r"S\([1-9]", layout):
            bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or "0")[0])
            found.append((f"{dtype}[{sizes}]", math.prod(_numbers(sizes)) * bits // 8))
    return found


def _size(shape: str) -> int:
    return sum(size for _, size in _arrays(re.sub(r"S\(\d+\)", "", shape)))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _dims(shape: str) -> list[int]:
    return _numbers(ARRAY.findall(shape)[0][1])


def writes(instruction: Instruction) -> bool:
    """Whether it fills a buffer. Of an asynchronous pair the second half does: the first has its operands, too."""
    return instruction.op not in NO_BUFFER and not instruction.op.endswith(("-start", "-update"))


def _written(module: Module, scope, instruction: Instruction) -> int:
    """Bytes written; of an update in place those of the update."""
    whole = sum(size for _, size in _arrays(instruction.shape))
    if instruction.op == "fusion":
        scope = module[instruction.attribute("calls")]
        instruction = next(i for i in scope.values() if i.root)
    roots = [scope[name] for name in instruction.operands] if instruction.op == "tuple" else [instruction]
    for root in roots:
        while root.op == "bitcast" and root.operands[0] in scope:
            root = scope[root.operands[0]]
        if root.op == "dynamic-update-slice":
            whole += _size(scope[root.operands[1]].shape) - _size(root.shape)
    return max(whole, 0)


def group(instruction: Instruction) -> tuple[int, ...]:
    """Devices of the first group of a collective, in any spelling of XLA; () is all. Of a permutation the first pair.

    ValueError for a spelling that is not known.
    """
    rest = instruction.rest
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}|source_target_pairs=\{\{([\d,]*)\}", rest):
        return tuple(_numbers(found[1] or found[2]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(int(d) for d in _devices(found[2]).reshape(_numbers(found[1]))[0])
    if found := re.search(r"replica_groups=mesh\[([^]]+)\](?:, device_ids=\((.*?)\))? \{([^}:]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        devices = _devices(found[2] or str([*sizes.values()])).reshape([*sizes.values()])
        own = re.findall(r"'(\w+)'", found[3])
        return tuple(int(d) for d in devices[tuple(slice(None) if name in own else 0 for name in sizes)].ravel())
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise ValueError(
            f"groups of devices in a spelling that is not known: {rest[rest.index('replica_groups=') :][:80]}"
        )
    return ()


def _devices(text: str) -> np.ndarray:
    """[2,4] or [2,4]T(1,0): all devices in order, in that shape, with its axes turned."""
    dims, _, order = text.partition("T")
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order) or range(devices.ndim))


def _dot_flops(scope, dot: Instruction) -> float:
    """Also of a call of a library, which says the same in JSON."""
    lhs = _dims(scope[dot.operands[0]].shape)
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)(["\d,]*)', dot.rest)
    return 2.0 * math.prod(_dims(dot.shape)) * math.prod(lhs[i] for i in _numbers(axes[1] if axes else ""))


def _convolution_flops(scope, convolution: Instruction) -> float:
    """TPUs make convolutions of all products; batch axes are spatial ones, dilated so that one term of each is real."""
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", convolution.attribute("dim_labels", r"(\S+?)[,\s]"))
    lhs, rhs = (dict(zip(labels, _dims(scope[name].shape), strict=True)) for labels, name in
                zip((lhs_labels, rhs_labels), convolution.operands, strict=True))  # fmt: skip
    out = dict(zip(out_labels, _dims(convolution.shape), strict=True))
    window = convolution.attribute("window", r"\{([^}]*)\}") or ""
    fields = {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", window)}
    terms = 1
    for axis in range(len(lhs) - 2):
        size, stride, dilation, spread, low = (
            int(fields[key][axis].split("_")[0]) if key in fields else default
            for key, default in (("size", 1), ("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        terms *= _terms(lhs[str(axis)], out[str(axis)], size, stride, dilation, spread, low)
    return 2.0 * out["b"] * out["f"] * rhs["i"] * terms


@functools.cache
def _terms(length, outputs, size, stride, dilation, spread, low) -> int:
    """Pairs of an output and a window position that meet an input and not padding or a gap."""
    at = np.arange(outputs)[:, None] * stride + np.arange(size) * spread - low
    return int(np.sum((at >= 0) & (at <= (length - 1) * dilation) & (at % dilation == 0)))


def _call_flops(scope, call: Instruction, target: str | None) -> float | None:
    """Of a matrix library, of our Triton kernels, and of a Pallas kernel, which says it itself; None if not known."""
    if target and target.startswith("__cublas"):
        return _dot_flops(scope, call)
    if target == "triton_kernel_call":
        return _triton_flops(scope, call)
    found = re.search(r'"cost_estimate":(\{[^}]*\})', call.rest)
    return float(json.loads(found[1]).get("flops", 0)) if found else None


def _triton_flops(scope, call: Instruction) -> float | None:
    """Products of the kernels of kernels.triton, which say nothing of themselves; their operands and results tell them.

    forward (q, k, v and three tangents, of which a primal stands in for zero) -> (o, lse, ȯ); tangent (q, k, v, o, lse
    and the tangents) -> ȯ; delta (o, g) -> row; the two of the backward pass (q, k, v, lse, g, row) -> dK, dV or dQ.
    """
    names = call.operands
    if len(names) == 2:
        return 0.0
    if len(names) not in (6, 8):
        return None
    (b, q, n, d), (_, k, _, _) = (_dims(scope[name].shape) for name in names[:2])
    product = 2.0 * b * q * k * n * d
    shapes = [_numbers(sizes) for _, sizes, _ in ARRAY.findall(call.shape)]
    if len(names) == 6 and scope[names[3]].shape.startswith("f32") and len(_dims(scope[names[3]].shape)) == 3:
        grown = [len(shape) == 4 for shape in shapes]  # S again and the cotangent of P, then one for each gradient
        return product * (2 + sum(grown))
    moves = [name not in names[:3] for name in names[-3:]]
    of_scores = sum(moves[:2])
    return product * ((2 if len(names) == 6 else 1) + of_scores + bool(of_scores) + moves[2])


FLOPS = {"dot": _dot_flops, "convolution": _convolution_flops}
