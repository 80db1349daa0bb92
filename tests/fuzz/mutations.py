"""Files that are nearly right: strategies that change bytes, JSON and pickles."""

import json

from hypothesis import strategies as st

from tests.torch_pickle import ORDERED, REBUILD, Call, Name, opcodes, storage, tensor

PLACE = st.integers(0, 2**16)  # of a byte, modulo what there is
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63, 2**64 - 1]
CANARY = "tests.fuzz.watch", "canary"  # a function that must not be called
CODE = "__import__('tests.fuzz.watch', fromlist=['watch']).canary()"


def _flip(draw, data: bytearray, _):
    data[draw(PLACE) % len(data)] ^= 1 << draw(st.integers(0, 7))


def _overwrite(draw, data: bytearray, _):
    place, width = draw(PLACE) % len(data), draw(st.sampled_from([1, 2, 4, 8]))
    number = draw(st.sampled_from(NUMBERS)) & ((1 << 8 * width) - 1)
    data[place : place + width] = number.to_bytes(width, "little")


def _cut_off(draw, data: bytearray, _):
    del data[draw(PLACE) % len(data) :]


def _cut_out(draw, data: bytearray, _):
    start = draw(PLACE) % len(data)
    del data[start : start + draw(st.integers(1, 64))]


def _insert(draw, data: bytearray, words):
    place = draw(PLACE) % len(data)
    data[place:place] = draw(st.sampled_from(words) | st.binary(min_size=1, max_size=8))


def _duplicate(draw, data: bytearray, _):
    start, place = draw(PLACE) % len(data), draw(PLACE) % len(data)
    part = data[start : start + draw(st.integers(1, 200))]
    data[place:place] = part * draw(st.sampled_from([1, 1, 1, 2, 50]))


def _splice(draw, data: bytearray, words):
    start, place = draw(PLACE) % len(data), draw(PLACE) % len(data)
    data[:] = data[:place] + data[start:]


@st.composite
def changed(draw, seed: bytes, words: tuple[bytes, ...] = (b"\0" * 100,), most: int = 5) -> bytes:
    """Bytes with up to so many changes; words: what is put in."""
    data = bytearray(seed)
    kinds = (_flip, _overwrite, _cut_off, _cut_out, _insert, _duplicate, _splice)
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
        if data:
            kind(draw, data, words)
    return bytes(data)


# --- JSON

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "x" * 1000, "\x1b[31m", "\ud800", "..", "/etc/passwd", "a.safetensors", "\0", "__metadata__"]),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 10**400]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
JSON_WORDS = (b"[" * 3000, b'{"a":' * 3000, b'"x":1,', b"1e999", b"9" * 5000, b"\xff", b"\\ud800", b"[" + b"1," * 3000)


def _places(value, path=()):
    """The paths of all in nested lists and dicts."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


@st.composite
def changed_json(draw, seed) -> bytes:
    """A text of nested lists and dicts of which some are gone, exchanged, or moved; sometimes also its bytes."""
    value = json.loads(json.dumps(seed))
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from([path for path in _places(value) if path] or [(None,)]))
        holder = value
        for key in path:
            holder = holder[key]
        if last is None or draw(st.integers(0, 30)) == 0:
            value = draw(VALUES)
        elif draw(st.booleans()):
            holder[last] = draw(VALUES)
        elif draw(st.booleans()):
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=5)) if draw(st.booleans()) else "x"] = holder[last]
        else:
            holder.insert(0, holder[last])
    text = json.dumps(value).encode()
    return draw(changed(text, JSON_WORDS, 3)) if draw(st.integers(0, 3)) == 0 else text


# --- pickles

GOOD = tensor("0", (2, 3), (3, 1), 6)
ITEMS: list = [
    1, -1, 2**31, 2**63, 2**80, "", "a", "x" * 300, None, True, 1.5, (), (1,), (2, 3), (3, 1), (1 << 40,), (-1,), GOOD,
    GOOD._replace(arguments=(GOOD.arguments[0], 0, (1 << 40,), (0,), False, None)), storage("0", 6), storage("1", 6),
    storage("0", 1 << 60), Name("torch", "Size"), Name("torch", "FloatStorage"), REBUILD, ORDERED.function, ORDERED,
    Name(*CANARY), Call(Name(*CANARY), ()), Call(Name("builtins", "eval"), (CODE,)),
    Call(Name("posix", "system"), ("true",)),
    Call(Name("_codecs", "encode"), ("a", "latin1")), {"a": GOOD}, [GOOD, 1], {1: {2: GOOD}}, {(1, (2,)): 3},
    Name("torch.nn.modules.linear", "Linear"), Name("torch.storage", "_load_from_bytes"),
    Name("dnnlib.util", "EasyDict"),
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"), {"_parameters": {"x": GOOD}, "_modules": {}},
]  # fmt: skip
CODES = [bytes([code]) for code in b"()]}0123.NlstRbaeudQoq\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94\x92"]
CODES += [
    b"q\0",
    b"h\0",
    b"q\1",
    b"h\1",
    b"K\7",
    b"\x80\4",
    b"\x82\1",
    b"r\xff\xff\xff\x7f",
    b"iposix\nsystem\n",
    b"P0\n",
]
CODES += [
    b"\x95" + bytes(8),
    b"\x8a\xff" + b"\x7f" * 255,
    b"\x8b" + b"\xff" * 4,
    b"\x8e" + b"\xff" * 8,
    b"I1\n",
    b"L5L\n",
]
FRAGMENTS = [*map(opcodes, ITEMS), *CODES]
BOMBS = [
    b"]q\0" + b"(h\0h\0e" * 500, b"}" * 2000, b"]" * 2000 + b"a" * 1999, b")" + b"\x85" * 3000,
    b"(" * 2000 + b"t" * 2000, (b"}" + opcodes("a")) * 900 + opcodes(GOOD) + b"s" * 900, b"N" * 3000,
    b"(" + b"N" * 2000 + b"tq\0" + (opcodes(Name("torch", "Size")) + b"h\0R") * 2000, b"2" * 3000,
    opcodes("x" * 3000) + b"q\0" + b"}h\0" * 100 + opcodes(GOOD) + b"s" * 100,
]  # fmt: skip
PICKLES = st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(FRAGMENTS) | st.sampled_from(BOMBS), max_size=25).map(
    lambda parts: b"\x80\x02" + b"".join(parts) + b"."
)


def pickles(seed: bytes) -> st.SearchStrategy[bytes]:
    """Of the grammar, or changed ones."""
    made = [opcodes(item) for item in ITEMS if item != ()]
    values = st.lists(st.sampled_from(made), max_size=6).map(
        lambda parts: b"\x80\x02}(" + b"".join(opcodes(str(i)) + part for i, part in enumerate(parts)) + b"u."
    )
    return st.one_of(PICKLES, values, changed(seed, tuple(FRAGMENTS + BOMBS)))
