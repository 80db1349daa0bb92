"""What a pickle holds, without running it.

A pickle is a program for a machine with a stack, and a file may be made to do harm: to call something, to copy a list
over and over, to put tuples in each other until whoever compares them has no stack left. This machine has a line for
every opcode that data need. It makes numbers, strings, lists, tuples and dicts, and calls what its reader names; what
it does is at most in proportion to the bytes that there are. Nothing is compared but strings and short integers.
"""

import dataclasses
import pickle
import pickletools
import types
import typing
from collections.abc import Callable

MOST_BITS = 1024  # of an integer
Find = Callable[[str, str], typing.Any]  # (module, name) -> what stands for it; UnpicklingError for all else


class Inert:
    """Base of the classes that a file can name. BUILD finds __setstate__ on the class and on its instances, so it can
    change neither; there is no __dict__."""

    __slots__ = ()

    @staticmethod
    def __setstate__(*state):
        pass


class Ignored(Inert):
    """Something that is no tensor and that real checkpoints have beside them; its arguments are dropped."""

    __slots__ = ()

    def __new__(cls, *args):
        return super().__new__(cls)


class Dict(Inert, dict):
    """A dict without attributes: the _metadata of state dicts is dropped."""

    __slots__ = ()

    def __init__(self, pairs=()):
        super().__init__()
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            self[_key(key)] = value


@dataclasses.dataclass
class Machine:
    """The state of it: a stack, where the marks in it are, and what is memorised."""

    size: int
    find: Find
    refer: Callable[[typing.Any], typing.Any]
    stack: list = dataclasses.field(default_factory=list)
    marks: list[int] = dataclasses.field(default_factory=list)
    memo: dict[int, typing.Any] = dataclasses.field(default_factory=dict)
    copied: int = 0


def load(stream: typing.BinaryIO, size: int, find: Find, refer: Callable[[typing.Any], typing.Any]) -> typing.Any:
    """What the pickle makes that begins where a stream is open; the stream then stands behind it.

    size: bytes of the stream in all. refer: gives what a persistent reference stands for. A pickle that is damaged
    raises anything, pickle.UnpicklingError with words where it asks for what no data need.
    """

    def read(count):  # a buffer of the bytes that are asked for would be made before it is seen that they are not there
        return stream.read(min(count, size - stream.tell()))

    clipped = types.SimpleNamespace(read=read, readline=stream.readline, tell=stream.tell)
    machine = Machine(size, find, refer)
    for opcode, argument, _ in pickletools.genops(clipped):  # pyright: ignore[reportArgumentType]
        if opcode.name == "STOP":
            break
        if opcode.name not in OPCODES:
            code = "the extension code" if opcode.name.startswith("EXT") else "what no file has:"
            raise pickle.UnpicklingError(f"it uses {code} {argument or opcode.name}")
        OPCODES[opcode.name](machine, argument)
    return machine.stack.pop()


def _key(key):
    """What a dict is given: others take their time when they are compared, and more stack than there is."""
    return key if type(key) is str or (type(key) is int and key.bit_length() < 64) else Ignored()


def _integer(machine, value):
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise pickle.UnpicklingError(f"it has an integer of {value.bit_length():,} bits")
    machine.stack.append(value)


def _above_mark(machine) -> list:
    start = machine.marks.pop()
    values = machine.stack[start:]
    del machine.stack[start:]
    return values


def _pop(machine, count: int) -> list:
    values = [machine.stack.pop() for _ in range(count)]
    return values[::-1]


def _pop_one(machine, _):
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _put(machine, index):
    if index > machine.size:
        raise pickle.UnpicklingError(f"it has {machine.size} bytes and wants to memorise item {index}")
    machine.memo[index] = machine.stack[-1]


def _extend(machine, values):
    if type(machine.stack[-1]) is not list:
        raise pickle.UnpicklingError("it appends to what is no list")
    machine.stack[-1].extend(values)


def _set_items(machine, values):
    if not isinstance(machine.stack[-1], dict) or len(values) % 2:
        raise pickle.UnpicklingError("it gives keys and values to what is no dict")
    for key, value in zip(values[::2], values[1::2], strict=True):
        machine.stack[-1][_key(key)] = value


def _dict(machine, _):
    values = _above_mark(machine)
    machine.stack.append({})
    _set_items(machine, values)


def _global(machine, argument):
    machine.stack.append(machine.find(*argument.split(" ", 1)))


def _stack_global(machine, _):
    module, name = _pop(machine, 2)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise pickle.UnpicklingError("it names something by what is no string")
    machine.stack.append(machine.find(module, name))


def _call(machine, made, arguments, new=False):
    """A call, or made.__new__ alone. What it may copy counts: a file would have it copied again and again."""
    if not isinstance(made, type) or type(arguments) is not tuple:
        raise pickle.UnpicklingError("it calls what is no class, or without arguments")
    sized = (str, bytes, bytearray, list, tuple, dict)
    machine.copied += len(arguments) + sum(len(value) for value in arguments if isinstance(value, sized))
    if machine.copied > 2 * machine.size + 10_000:
        raise pickle.UnpicklingError(f"it has {machine.size} bytes and copies more than twice as many things")
    machine.stack.append(made.__new__(made, *arguments) if new else made(*arguments))


def _object(machine, _):
    made, *arguments = _above_mark(machine)
    _call(machine, made, tuple(arguments))


def _instance(machine, argument):
    arguments = _above_mark(machine)
    _call(machine, machine.find(*argument.split(" ", 1)), tuple(arguments))


def _new_with_names(machine, _):
    made, arguments, named = _pop(machine, 3)
    if named:
        raise pickle.UnpicklingError("it calls something with arguments by name")
    _call(machine, made, arguments, new=True)


def _build(machine, _):
    made, state = machine.stack[-2], machine.stack.pop()
    if not (isinstance(made, Inert) or (isinstance(made, type) and issubclass(made, Inert))):
        raise pickle.UnpicklingError(f"it gives a state to {type(made).__name__!r}")
    made.__setstate__(state)


def _to_set(machine, _):
    _above_mark(machine)
    if not isinstance(machine.stack[-1], Ignored):
        raise pickle.UnpicklingError("it adds to what is no set")


def _protocol(machine, version):
    if version > pickle.HIGHEST_PROTOCOL:
        raise pickle.UnpicklingError(f"it is of protocol {version}, the last that is known is 5")


OPCODES: dict[str, Callable[[Machine, typing.Any], object]] = {
    "PROTO": _protocol,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_SET": lambda m, _: m.stack.append(Ignored()),  # nothing in a set is a tensor
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "LIST": lambda m, _: m.stack.append(_above_mark(m)),
    "TUPLE": lambda m, _: m.stack.append(tuple(_above_mark(m))),
    "TUPLE1": lambda m, _: m.stack.append(tuple(_pop(m, 1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(_pop(m, 2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(_pop(m, 3))),
    "DICT": _dict,
    "APPEND": lambda m, _: _extend(m, _pop(m, 1)),
    "APPENDS": lambda m, _: _extend(m, _above_mark(m)),
    "SETITEM": lambda m, _: _set_items(m, _pop(m, 2)),
    "SETITEMS": lambda m, _: _set_items(m, _above_mark(m)),
    "ADDITEMS": _to_set,
    "FROZENSET": lambda m, _: (_above_mark(m), m.stack.append(Ignored())),
    "POP": _pop_one,
    "POP_MARK": lambda m, _: _above_mark(m),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m, _: _put(m, len(m.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _instance,
    "OBJ": _object,
    "REDUCE": lambda m, _: _call(m, *_pop(m, 2)),
    "NEWOBJ": lambda m, _: _call(m, *_pop(m, 2), new=True),
    "NEWOBJ_EX": _new_with_names,
    "BUILD": _build,
    "PERSID": lambda m, argument: m.stack.append(m.refer(argument)),
    "BINPERSID": lambda m, _: m.stack.append(m.refer(m.stack.pop())),
}
OPCODES |= dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put)
OPCODES |= dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.stack.append(m.memo[index]))
OPCODES |= dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _integer)
for _name in ("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"):
    OPCODES[_name] = lambda m, value: m.stack.append(value)
for _name in ("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"):
    OPCODES[_name] = lambda m, value: m.stack.append(value)
