"""What the scripts share: flags, configs from files, errors in one line."""

import functools
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(ROOT))  # run from a checkout without installing


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
        argv[:] = sys.argv[:] = [found_config(arg) for arg in argv]
        try:
            return flags.FLAGS(argv)
        except (AttributeError, KeyError) as error:  # an override of a key in a group that the config lacks
            fail("unknown config key: " + re.sub(r"\\n|[\\'\"]", " ", str(error.args[0])))
        except (flags.Error, TypeError, ValueError, OSError) as error:
            fail(error)

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


def config_flag(words: str = "", default: str | None = None) -> flags.FlagHolder:
    """--config=FILE[:variants] with overrides --config.key=value; configs/ may be left out of FILE."""
    words = words or "File with get_config(); --config.KEY=VALUE changes a key."
    return config_flags.DEFINE_config_file(
        "config", default, words, lock_config=False, accept_new_attributes=True
    )  # unknown keys are named by `experiment`, together with those that there are


def media_flags() -> tuple[flags.FlagHolder, flags.FlagHolder, flags.FlagHolder]:
    """--text_encoder, --tokenizer and --vae: the published files around a network."""
    encoder = "Published weights of umT5 (Wan) or T5 (Cosmos), any layout."
    tokenizer = "The folder of its tokenizer.json, or a repository of the hub."
    vae = "Published weights of the autoencoder, any layout."
    texts = {"text_encoder": encoder, "tokenizer": tokenizer, "vae": vae}
    first, second, third = (flags.DEFINE_string(name, None, text) for name, text in texts.items())
    return first, second, third


def cluster_flags() -> tuple[flags.FlagHolder, ...]:
    """--distributed, --coordinator, --processes and --process."""
    return (
        flags.DEFINE_bool("distributed", False, "One of several processes, as the environment says."),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, reachable by all; PORT is free there."),
        flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1),
        flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0),
    )


def join_cluster(cluster: tuple[flags.FlagHolder, ...], **options) -> None:
    """Joins the other processes if one of `cluster_flags` is given."""
    from rcm_jax.parallel import distributed

    if any(flag.value if flag.name == "distributed" else flag.present for flag in cluster):
        distributed.initialize(*(flag.value for flag in cluster[1:]), **options)


def found_config(argument: str) -> str:
    """--config=digits or --config=digits.py:scm as --config=…/configs/digits.py:scm, where that is a file."""
    match = re.fullmatch(r"(--?config=)([^:]+?)(\.py)?(:.*)?", argument)
    if match and not pathlib.Path(f"{match[2]}.py").exists():
        path = CONFIGS / f"{match[2]}.py"
        if path.exists():
            return f"{match[1]}{path}{match[4] or ''}"
    return argument


def experiment(flag: flags.FlagHolder, teachers: bool = False):
    """The Experiment (teachers: or the Pretraining) of --config with the overrides of the command line; ValueError that
    names a bad key.

    A group whose kind is changed keeps nothing of what the other kind had, but that synthetic data keep their shape and
    optimizers, which have the same keys, all.
    """
    from rcm_jax.run.experiment import Experiment, from_mapping  # after the script has set what JAX reads at import
    from rcm_jax.train.optimizer import OPTIMIZERS

    values = flag.value.to_dict()
    changed = config_flags.get_override_values(flags.FLAGS[flag.name])
    for path in changed:
        if path.endswith(".kind"):
            groups = path.split(".")[:-1]
            group = functools.reduce(dict.__getitem__, groups, values)
            if group["kind"] in OPTIMIZERS:
                continue
            kept = {"shape"} if groups == ["data"] and group["kind"] == "synthetic" else set()
            for key in set(group) - kept:
                place = ".".join([*groups, key])
                if not any(other == place or other.startswith(f"{place}.") for other in changed):
                    del group[key]
    run = from_mapping(values)
    if not teachers and not isinstance(run, Experiment):
        raise ValueError("this config makes a teacher alone, which scripts/train.py does; here it takes a distillation")
    return run


def overwrite_flag() -> flags.FlagHolder:
    """--overwrite, without which a result that is there is not written over."""
    return flags.DEFINE_bool("overwrite", False, "Write over results that are there.")


def as_size(name: str, text: str | None) -> tuple[int, int] | None:
    """(width, height) of the value of a flag; None for None."""
    if text is None:
        return None
    if not (found := re.fullmatch(r"(\d+)[x×](\d+)", text)):
        raise ValueError(f"{name}={text} must be WIDTHxHEIGHT in pixels, e.g. 832x480")
    return int(found[1]), int(found[2])


def read_lines(path: str) -> list[str]:
    """The prompts in a file, one on each line; ValueError if there is none."""
    from rcm_jax.util.files import local

    lines = [line.strip() for line in local(path).read_text(encoding="utf-8-sig").splitlines()]
    if not any(lines):
        raise ValueError(f"{path} holds no prompt: it must have one on a line")
    return [line for line in lines if line]
