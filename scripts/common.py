"""What the scripts share: flags, configs from files, errors in one line."""

import math
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Mapping

from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # run from a checkout without installing


NO_TYPE = "a config key that is None in its file cannot be set from the command line: edit the file"


def run(main: Callable[[], None]) -> None:
    """Parse flags, run main; what the user can mend (flags, config, files) ends as one line and exit status 2."""

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # the libraries' running commentary
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as tidily as on Ctrl-C
        try:
            if len(argv) > 1:
                raise ValueError(f"unknown argument {argv[1]!r}: flags look like --name=value")
            main()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except (ValueError, OSError) as error:
            if os.environ.get("RCM_TRACEBACK"):
                raise
            fail(error)

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except TypeError as error:
            fail(NO_TYPE if "NoneType" in str(error) else error)
        except (AttributeError, KeyError) as error:  # an override of a key that the config lacks
            fail("unknown config key: " + re.sub(r"\\n|[\\'\"]", " ", str(error.args[0])))
        except (flags.Error, ValueError, OSError) as error:
            fail(NO_TYPE if "NoneType" in str(error) else error)

    app.run(guarded, flags_parser=parse)


def fail(error) -> None:
    """One line on stderr and exit status 2."""
    text = str(error)
    if "Traceback" in text:  # ml_collections quotes all of it where a config file raises
        text = text.strip().splitlines()[-1]
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(2)


def tally(tensors: Mapping) -> tuple[int, int, str]:
    """(numbers, bytes, dtypes) of {name: tensor}."""
    counts = [math.prod(tensor.shape) for tensor in tensors.values()]
    size = sum(count * tensor.dtype.itemsize for count, tensor in zip(counts, tensors.values(), strict=True))
    return sum(counts), size, "/".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))


def bytes_bar(label: str, size: int) -> tqdm:
    """Progress through so many bytes, on the console."""
    often = 0.5 if sys.stderr.isatty() else 20  # seconds
    return tqdm(total=size, desc=label, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=often)


def config_flag() -> flags.FlagHolder:
    """--config=FILE with overrides --config.key=value."""
    return config_flags.DEFINE_config_file("config", None, "File with get_config(); --config.KEY=VALUE changes a key.")
