"""Export weights: python scripts/export_checkpoint.py --checkpoint=WORKDIR --layout=diffusers --dst=DIR

From a workdir of scripts/train.py (the averaged student, unless --item says otherwise) or of convert_checkpoint.py to
safetensors: for diffusers (`from_pretrained(DIR)`), under Wan-AI's names (also ComfyUI's), or those of NVlabs/rcm.
"""

import common  # noqa: I001  (puts the checkout on the path)
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict

from rcm_jax import convert
from rcm_jax.convert import adapters
from rcm_jax.models import NETWORKS
from rcm_jax.run import weights, workdir
from rcm_jax.convert.files import write_tensors
from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.table import cast
from rcm_jax.util.config import kind_of
from rcm_jax.util.files import check_new_folder

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir of scripts/train.py or convert_checkpoint.py.")
ITEM = flags.DEFINE_enum("item", "ema", ["ema", "student", "fake_score"], "Which network; ema: the averaged student.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Training step of the checkpoint; the newest if not given.")
LAYOUT = flags.DEFINE_string("layout", "diffusers", "official, rcm or diffusers; of an adapter official or peft, too.")
ADAPTER = flags.DEFINE_bool("adapter", False, "Of a student that is an adapter (LoRA) that alone, not merged.")
MERGE = flags.DEFINE_string("merge", None, "A .safetensors file of an adapter (LoRA), merged into what is exported.")
DST = flags.DEFINE_string("dst", None, "The folder to make: new or empty.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    "keep",
    ["keep", *convert.PUBLISHED_DTYPES],
    "Of what is written; modulation, time embedding and norms stay wide.",
)
SHARD_GB = flags.DEFINE_float(
    "shard_gb", None, "Most of one file, in 10⁹ bytes; by default 10 for diffusers, else all."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be done; write nothing.")
flags.mark_flags_as_required(["checkpoint", "dst"])


def main():
    """Reads a workdir, and writes its weights under published names."""
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to whoever trains on them
    run = workdir.read(CHECKPOINT.value)
    kind = kind_of(NETWORKS, run.model)
    if kind not in convert.GENERATORS:
        raise ValueError(f"{CHECKPOINT.value} holds a {kind}; what can be exported is {', '.join(convert.GENERATORS)}")
    check_layout(run, kind)
    if SHARD_GB.value is not None and not 0 < SHARD_GB.value < math.inf:
        raise ValueError(f"--shard_gb={SHARD_GB.value} must be above 0, and finite")
    check_new_folder(DST.value)
    if ADAPTER.value:
        leaves, step = weights.own_leaves_of(CHECKPOINT.value, ITEM.value, STEP.value)
    else:
        leaves, step = weights.leaves_of(CHECKPOINT.value, ITEM.value, STEP.value, MERGE.value)
    count, _, held = common.tally(leaves)
    dtype = held if DTYPE.value == "keep" else DTYPE.value
    print(f"{CHECKPOINT.value}: {ITEM.value} of step {step}, {count:,} parameters in {held}")
    print(f"{DST.value}: to be {kind} in the layout {LAYOUT.value!r} in {dtype}")
    if DRY_RUN.value:
        print("dry run: nothing was written")
        return
    params = unflatten_dict({path: np.asarray(leaf) for path, leaf in leaves.items()}, sep="/")
    if ADAPTER.value:
        adapter = adapters.Adapter(params, run.adapter.scale)
        if DTYPE.value != "keep":
            adapter = adapter.astype(DTYPE.value)
        names = adapters.write(DST.value, kind, run.model, adapter, LAYOUT.value)
        print(f"{DST.value}: {', '.join(names)}")
        return
    tensors = convert.to_reference(kind, params, run.model, LAYOUT.value)
    if DTYPE.value != "keep":
        tensors = {name: narrowed(kind, name, tensor, jnp.dtype(DTYPE.value)) for name, tensor in tensors.items()}
    described = convert.MODELS[kind].described(run.model, LAYOUT.value)
    with common.bytes_bar("writing", common.tally(tensors)[1]) as bar:
        names = write_tensors(
            DST.value,
            tensors,
            shard_bytes=1e9 * (SHARD_GB.value or (10 if LAYOUT.value == "diffusers" else math.inf)),
            extra_files={"config.json": json.dumps(described, indent=2) + "\n"} if described else {},
            progress=bar.update,
        )
    print(f"{DST.value}: {', '.join(names)}")


def check_layout(run, kind: str) -> None:
    """ValueError for a layout that the network, or its adapter, does not have, and for no adapter where one is asked
    for."""
    if not ADAPTER.value:
        convert.check_layout(kind, run.model, LAYOUT.value)
    elif workdir.adapter_of(run) is None:
        raise ValueError(
            f"--adapter: {CHECKPOINT.value} holds whole parameters; scripts/extract_lora.py makes an adapter of them"
        )
    elif LAYOUT.value not in adapters.LAYOUTS or MERGE.value:
        raise ValueError(f"--adapter is written in the layouts {', '.join(adapters.LAYOUTS)}, and without --merge")


def narrowed(kind, name, tensor, dtype):
    """The tensor in another dtype, made when it is written; those that should stay wide as they are."""
    if any(part in name for part in convert.MODELS[kind].wide) and tensor.dtype.itemsize > dtype.itemsize:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: cast(tensor, dtype, name))


if __name__ == "__main__":
    common.run(main)
