"""Which implementation serves each pass of "auto": the first candidate that is right on the device at hand.

The check (`kernels.accuracy`) runs once in a process for each size of heads and dtype. Of several processes each checks
on its own device, and what one of them cannot use nobody uses: `settle` makes them agree. It holds a collective, which
every process must reach, so that attention itself never starts one.
"""

import functools
import json
import logging
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .accuracy import TOLERANCE, cases, findings
from .implementations import IMPLEMENTATIONS, PASSES, Implementation

# {backend: {pass: names, the best first}}, before "blockwise". A tangent and its transpose need O in float32
# (docs/precision.md), which libraries do not give: they serve calls that nobody differentiates.
CANDIDATES = {
    "gpu": dict.fromkeys(PASSES, ("triton",)) | {"value": ("fa4", "cudnn", "triton")},
    "tpu": dict.fromkeys(PASSES, ("pallas_tpu",)),
}
ALWAYS = "blockwise"
TOKENS = 32_760  # whose raggedness is checked where no other is known: 81 frames of 832×480 in Wan
WORD = 2**14  # bytes that a process tells the others

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """Why a candidate is not to be used for a pass; "" if it may."""

    why: str = ""
    refused: bool = False  # it is not made for this, or not installed: nothing to worry about


def choices() -> tuple[str, ...]:
    """What may be asked for: "auto", and the implementations that have every pass."""
    return ("auto", *(name for name, each in IMPLEMENTATIONS.items() if all(map(each.does, PASSES))))


def settle(head_size: int, dtype, tokens: int = TOKENS, masked: bool = False) -> dict[str, str]:
    """{pass: name of what serves it} for "auto", decided now unless it is. Several processes must all call it.

    Seconds on a GPU or TPU, nothing elsewhere. Logs once what is chosen, and warns of what fails and what is missed.

    Args:
      head_size: features of a head.
      dtype: of q, k and v.
      tokens: of self-attention; what is checked ends within a tile as they do.
      masked: for calls with a mask.
    """
    key = _key(head_size, dtype, masked)
    with _lock:
        if key not in _settled:
            _settled[key] = _choose(*key, tokens)
        return _settled[key]


def implementation(asked: str, head_size: int, dtype, tokens: int = TOKENS, masked: bool = False) -> Implementation:
    """What runs where a call asks for one of choices(): for "auto" what is settled, or will be settled here.

    With several processes nothing can be settled here: it is blockwise, with a warning.
    """
    if asked not in choices():
        raise ValueError(f"unknown attention implementation {asked!r}: choose from {[*choices()]}")
    if asked != "auto":
        _log_asked(jax.default_backend(), asked)
        return IMPLEMENTATIONS[asked]
    key = _key(head_size, dtype, masked)
    if key not in _settled and _candidates(*key) and jax.process_count() > 1:
        _warn_unsettled(*key)
        return IMPLEMENTATIONS[ALWAYS]
    return _together(tuple(settle(head_size, dtype, tokens, masked).items()))


_settled: dict[tuple, dict[str, str]] = {}
_lock = threading.Lock()


def _together(names) -> Implementation:
    """The functions of several implementations: the same for the same names, as keys of compiled programs must be."""
    one = IMPLEMENTATIONS[names[0][1]]
    if all(IMPLEMENTATIONS[each] is one for _, each in names):
        return one
    return Implementation(**{name: IMPLEMENTATIONS[each].does(name) for name, each in names})


def _key(head_size, dtype, masked) -> tuple[str, int, str, bool]:
    return jax.default_backend(), int(head_size), str(jnp.dtype(dtype)), masked


def _candidates(backend, head_size, dtype, masked) -> list[tuple[str, str]]:
    """Pairs of a pass and a name. A candidate that takes no mask says so itself."""
    if dtype not in TOLERANCE:  # float64 is for tests
        return []
    return [(name, each) for name, names in CANDIDATES.get(backend, {}).items() for each in names]


def in_words(names: dict[str, str]) -> str:
    """{pass: name}, grouped by name; one name alone if it serves every pass."""
    if len(set(names.values())) == 1:
        return f'"{next(iter(names.values()))}"'
    passes = {}
    for what, name in names.items():
        passes.setdefault(name, []).append(what)
    return "; ".join(f'{", ".join(each)} by "{name}"' for name, each in passes.items())


def _choose(backend, head_size, dtype, masked, tokens) -> dict[str, str]:
    pairs, start = _candidates(backend, head_size, dtype, masked), time.perf_counter()
    verdicts = _agreed(_verdicts(pairs, head_size, dtype, cases(tokens, masked))) if pairs else {}
    names = dict.fromkeys(PASSES, ALWAYS)
    for name, each in reversed(pairs):
        if not verdicts[name, each].why:
            names[name] = each
    where = _where(backend, head_size, dtype, masked)
    taken = f" (checked in {time.perf_counter() - start:.1f} s)" if pairs else ""
    log.info("%s: %s%s", where, in_words(names), taken)
    _warn(where, verdicts, names)
    return names


def _verdicts(pairs, head_size, dtype, cases) -> dict[tuple[str, str], Verdict]:
    """Of this process's device."""
    verdicts = dict.fromkeys(pairs, Verdict())
    for (name, each, case), found in findings(pairs, head_size, dtype, cases).items():
        why = found.why_not(case, dtype)
        if why and not verdicts[name, each].why:
            verdicts[name, each] = Verdict(why, found.refused)
    return verdicts


def _agreed(verdicts):
    """Of all processes: that of the first to object."""
    if jax.process_count() == 1:
        return verdicts
    word = json.dumps([*verdicts.values()]).encode()
    buffer = np.zeros(WORD, np.uint8)
    buffer[: len(word)] = np.frombuffer(word, np.uint8)
    told = [json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(buffer)]
    agreed = {}
    for pair, *each in zip(verdicts, *told, strict=True):
        objections = [Verdict(f"in process {i}: {why}", refused) for i, (why, refused) in enumerate(each) if why]
        agreed[pair] = min(objections, key=lambda verdict: verdict.refused, default=Verdict())
    return agreed


def _warn(where, verdicts, names):
    """Of candidates that fail, and where no kernel serves a pass of all the reasons."""
    passes = {}
    for (name, each), (why, refused) in verdicts.items():
        if why and (names[name] == ALWAYS or not refused):
            passes.setdefault((each, why, names[name]), []).append(name)
    for (each, why, instead), those in passes.items():
        slower = ", which is slower" if instead == ALWAYS else ""
        log.warning(
            '%s: "%s" is not used for %s (%s): "%s" takes over%s', where, each, ", ".join(those), why, instead, slower
        )


def _where(backend, head_size, dtype, masked) -> str:
    return f"attention on {backend}, heads of {head_size}, {dtype}{', masked' if masked else ''}"


@functools.cache  # once in a process
def _log_asked(backend, name):
    log.info('attention on %s: "%s", as asked', backend, name)


@functools.cache
def _warn_unsettled(*key):
    log.warning(
        '%s: "%s", which is slower. With several processes kernels are chosen by rcm_jax.kernels.attention.settle, '
        "which all of them must call with this size of heads and this dtype before anything is traced",
        _where(*key),
        ALWAYS,
    )
