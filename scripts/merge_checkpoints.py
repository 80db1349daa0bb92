"""Merge weights: python scripts/merge_checkpoints.py --model=NAME --base=FILES --term=WEIGHT,FILES,FILES --dst=DIR

Writes base + Σ weight·(a − b), a --term=WEIGHT,A,B for each: what a training made of b, added to other weights. All may
be published files in any layout, or workdirs (of which the averaged student is taken). The result is safetensors under
the names of base, in its dtypes. So what rCM made of text to video is added to image to video, for both networks alike:

python scripts/merge_checkpoints.py --model=wan2.2-i2v-a14b --base=Wan2.2-I2V-A14B/low_noise_model \\
    --term=1,T2V-14B-rCM.pt,Wan2.1-T2V-14B --skip='patch_embedding.weight' --dst=DIR
"""

import common  # noqa: I001  (puts the checkout on the path)
import fnmatch
import functools
import json
import math
import os
import secrets
import shutil

import jax
from absl import flags

from rcm_jax import convert
from rcm_jax.convert import merge
from rcm_jax.convert.files import write_tensors
from rcm_jax.run.weights import open_weights
from rcm_jax.util.files import as_path, check_new_folder, check_writable, empty, stored

MODEL = flags.DEFINE_string("model", None, f"Of base: {', '.join(convert.PUBLISHED)}, or a JSON file as config.model.")
BASE = flags.DEFINE_string(
    "base", None, "Weights: a file, shards with an index, a folder with one of these, a workdir."
)
TERM = flags.DEFINE_multi_string("term", None, "WEIGHT,A,B adds WEIGHT·(A − B); may be given several times.")
SKIP = flags.DEFINE_multi_string("skip", [], "Tensors of these names (* stands for anything) stay as they are in base.")
DST = flags.DEFINE_string("dst", None, "The folder to make.")
SHARD_GB = flags.DEFINE_float("shard_gb", 10, "Most of one file, in 10⁹ bytes.", lower_bound=1e-6)
OVERWRITE = common.overwrite_flag()
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be done, check all names and shapes, write nothing.")
flags.mark_flags_as_required(["model", "base", "term", "dst"])


def main():
    """Reads and writes tensor by tensor."""
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to whoever trains on them
    kind, config = convert.named(MODEL.value)
    place = check_target()
    base, layout = open_weights(BASE.value, kind, config, None)
    left = [name for name in base if skipped(name)]
    if lost := [pattern for pattern in SKIP.value if not fnmatch.filter(base, pattern)]:
        raise ValueError(f"--skip={lost[0]} is the name of no tensor; the first is {next(iter(base))}")
    terms = [opened(term, kind, config, layout) for term in TERM.value]
    tensors = merge.merge(base, terms)
    count, size, held = common.tally(tensors)
    print(f"{BASE.value}: {MODEL.value} in the layout {layout!r}, {len(base)} tensors, {count:,} parameters, {held}")
    for text in TERM.value:
        weight, plus, minus = parsed(text)
        print(f"{weight:+g} × ({plus} − {minus})")
    print(f"as in {BASE.value}: {', '.join(left) or 'no tensor'}")
    if DRY_RUN.value:
        print("dry run: all names and shapes fit; nothing was written")
        return
    described = convert.MODELS[kind].described(config, layout)
    write = functools.partial(
        write_tensors,
        tensors=tensors,
        shard_bytes=1e9 * SHARD_GB.value,
        extra_files={"config.json": json.dumps(described, indent=2) + "\n"} if described else {},
    )
    with common.bytes_bar("merging", size) as bar:
        names = replacing(place, functools.partial(write, progress=bar.update))
    print(f"{DST.value}: {', '.join(names)}")


def parsed(term: str) -> tuple[float, str, str]:
    """Of --term."""
    weight, *both = term.split(",")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if len(both) != 2 or not all(both) or not math.isfinite(number):
        raise ValueError(f"--term={term} must be WEIGHT,A,B: a number and two checkpoints, whose names have no comma")
    return number, *both


def skipped(name: str) -> bool:
    """Whether one of --skip is its name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in SKIP.value)


def opened(text: str, kind: str, config, layout: str) -> merge.Term:
    """A --term with its tensors under the names of a layout; ValueError that says which checkpoint does not fit."""
    weight, *both = parsed(text)
    return merge.Term(weight, *(open_weights(path, kind, config, layout, skipped)[0] for path in both))


def check_target():
    """--dst as a path; ValueError or OSError unless it can be written, in the place of what is there if --overwrite."""
    place = as_path(DST.value)
    if empty(place):
        check_new_folder(place)
    elif not OVERWRITE.value:
        raise FileExistsError(f"{place} is there: choose another name, or say --overwrite")
    elif stored(place) or not place.is_dir():
        raise ValueError(f"{place} cannot be written over: only a folder of this machine can; choose another name")
    elif strange := [p.name for p in place.iterdir() if not p.name.endswith((".safetensors", ".json"))]:
        raise ValueError(f"{place} holds {strange[0]}, which is no part of a result: choose another folder")
    else:
        check_writable(place.parent / f".{place.name}.probe")
    return place


def replacing(place, write) -> list[str]:
    """write(folder), in the place of a folder that is there; it stays until the new one is whole."""
    if empty(place):
        return write(place)
    place = place.resolve()
    new, old = (place.with_name(f".{place.name}.{secrets.token_hex(4)}") for _ in range(2))
    names = write(new)
    os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old)
    return names


if __name__ == "__main__":
    common.run(main)
