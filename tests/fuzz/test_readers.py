"""Every reader on files that are nearly right. `make fuzz` runs each for RCM_FUZZ_SECONDS; here some dozens of files.

Of a run that ends the process itself, the last files are in the newest folder of pytest's.
"""

import collections
import faulthandler
import itertools
import os
import pickle
import time
import tracemalloc

import hypothesis
import pytest
from absl import logging
from hypothesis import HealthCheck, Phase, settings

from tests.fuzz.mutations import CANARY, CODE
from tests.fuzz.readers import READERS, strategies
from tests.fuzz.watch import watched
from tests.torch_pickle import Call, Name, pickled

SECONDS = float(os.environ.get("RCM_FUZZ_SECONDS", "0"))
FEW, ROUND = 12, 500  # examples
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]


def checked(name: str, folder, counts: collections.Counter):
    """A test of one reader, for hypothesis."""
    read = READERS[name][1]

    @hypothesis.given(strategies(name))
    def check(files):
        for file, data in files.items():
            (folder / file).write_bytes(data)
        counts[watched(lambda: read(folder), folder, sum(map(len, files.values())))] += 1

    return check


@pytest.fixture
def traced():
    """Memory is counted; what hangs is ended with a traceback."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # what is left out of metrics is told line by line
    hypothesis.given(hypothesis.strategies.integers())(lambda n: None)()  # it first reads all code for its constants
    tracemalloc.start()
    if SECONDS:
        faulthandler.dump_traceback_later(SECONDS + 300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    tracemalloc.stop()
    logging.set_verbosity(before)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_gives_values_or_one_line(tmp_path, traced, name, capsys):
    counts = collections.Counter()
    options = dict(deadline=None, database=None, suppress_health_check=QUIET, phases=(Phase.generate, Phase.shrink))
    if not SECONDS:
        settings(max_examples=FEW, derandomize=True, **options)(checked(name, tmp_path, counts))()
        assert counts[False] > FEW / 10 or name == "metrics"  # which leaves out what cannot be read
        return
    end = time.monotonic() + SECONDS
    for seed in itertools.count(int(end)):
        if time.monotonic() > end:
            break
        hypothesis.seed(seed)(settings(max_examples=ROUND, **options)(checked(name, tmp_path, counts)))()
    with capsys.disabled():
        print(f"{name}: {counts.total():,} files, {counts[True]:,} of them read")


def test_the_canary_would_be_heard(tmp_path):
    """Else the tests above show nothing."""
    attacks = {"canary": Call(Name(*CANARY), ()), "canary ": Call(Name("builtins", "eval"), (CODE,))}
    attacks["os.system"] = Call(Name("posix", "system"), ("true",))
    for heard, attack in attacks.items():
        with pytest.raises(AssertionError, match=heard.strip()):
            watched(lambda attack=attack: pickle.loads(pickled(attack)), tmp_path, 10**6)
