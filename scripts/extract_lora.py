"""An adapter (LoRA) of two networks: python scripts/extract_lora.py --model=NAME --base=A --tuned=B --rank=64 --dst=DIR

For every kernel that adapters are for, the product of that rank which comes nearest to tuned − base: its first singular
vectors. Both may be published files in any layout, or workdirs (of which the averaged student is taken). How
much of each module's change is left out is printed, and how much biases, norms and all else change, of which an adapter
takes nothing.

python scripts/extract_lora.py --model=wan2.1-t2v-1.3b --base=Wan2.1-T2V-1.3B --tuned=WORKDIR --rank=128 --dst=DIR
"""

import common  # noqa: I001  (puts the checkout on the path)
import collections
import fnmatch
import functools
import math

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from rcm_jax import convert
from rcm_jax.convert import adapters
from rcm_jax.convert.extract import extract
from rcm_jax.models import NETWORKS
from rcm_jax.models.adapters import A, B
from rcm_jax.run.weights import open_weights
from rcm_jax.util.files import check_new_folder

MODEL = flags.DEFINE_string("model", None, f"{', '.join(convert.PUBLISHED)}, or a JSON file as config.model.")
BASE = flags.DEFINE_string(
    "base", None, "Weights: a file, shards with an index, a folder with one of these, a workdir."
)
TUNED = flags.DEFINE_string("tuned", None, "The weights that base with the adapter shall come near to; as --base.")
RANK = flags.DEFINE_integer("rank", 64, "Of the adapter.", lower_bound=1)
TARGET = flags.DEFINE_multi_string(
    "target", [], "Modules by our names (* stands for anything); by default the network's."
)
LAYOUT = flags.DEFINE_enum("layout", "diffusers", list(adapters.LAYOUTS), "Names in the file.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", convert.PUBLISHED_DTYPES, "Of what is written.")
DST = flags.DEFINE_string("dst", None, "The folder to make: new or empty.")
flags.mark_flags_as_required(["model", "base", "tuned", "dst"])


def main():
    """Reads tensor by tensor, and writes the adapter."""
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to whoever trains on them
    kind, config = convert.named(MODEL.value)
    targets = TARGET.value or NETWORKS[kind].adapted
    if not targets:
        raise ValueError(f"{MODEL.value} is a {kind}, whose kernels take no adapters")
    check_new_folder(DST.value)
    layout = adapters.LAYOUTS[LAYOUT.value].modules
    base, tuned = (open_weights(path, kind, config, layout)[0] for path in (BASE.value, TUNED.value))
    modules = adapters.modules_of(kind, config, layout)
    wanted = functools.partial(matched, targets)
    chosen = [name for name, entry in modules.items() if wanted(module_of(entry))]
    if lost := [t for t in targets if not any(matched([t], module_of(entry)) for entry in modules.values())]:
        raise ValueError(f"--target={lost[0]} is no module; they are {', '.join(map(module_of, modules.values()))}")
    parts, squares = {}, collections.defaultdict(lambda: np.zeros(2))
    found = extract(base, tuned, modules, RANK.value, wanted)
    for one in tqdm(found, "extracting", len(chosen), unit="kernel", dynamic_ncols=True):
        parts[(one.entry.rule.ours, one.entry.layer)] = {"name": one.module, A: one.down, B: one.up}
        squares[module_of(one.entry)] += one.size**2, one.left**2
    for name, both in (*squares.items(), ("all of these", sum(squares.values()))):
        size, left = np.sqrt(both)
        print(f"{name}: changed by {size:.4g}, of which {share(left, size):.4f} is left out")
    rest = left_out(base, tuned, {f"{name}.weight" for name in chosen})
    print(f"what takes no adapter: changed by {rest:.4g}, which is left out")
    adapter = adapters.stacked(parts, convert.shapes_of(kind, config)).astype(DTYPE.value)
    print(f"{DST.value}: {', '.join(adapters.write(DST.value, kind, config, adapter, LAYOUT.value))}")


def matched(targets, module: str) -> bool:
    """Whether a module of ours is one of those."""
    return any(fnmatch.fnmatchcase(module, target) for target in targets)


def module_of(entry) -> str:
    """By its path in our parameters."""
    return entry.rule.ours.removesuffix("/kernel")


def share(part: float, whole: float) -> float:
    """part/whole; 0 of nothing."""
    return part / whole if whole else 0.0


def left_out(base, tuned, chosen: set[str]) -> float:
    """The norm of what changes in all other tensors."""
    total = 0.0
    for name in (name for name in base if name not in chosen):
        change = np.asarray(tuned[name]).astype(np.float64) - np.asarray(base[name]).astype(np.float64)
        total += float(np.sum(np.square(change)))
    return math.sqrt(total)


if __name__ == "__main__":
    common.run(main)
