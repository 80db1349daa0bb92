"""Export weights: python scripts/export_checkpoint.py --checkpoint=WORKDIR --layout=diffusers --dst=DIR

From a workdir of scripts/train.py (the averaged student, unless --item says otherwise) or of convert_checkpoint.py to
safetensors: for diffusers (`from_pretrained(DIR)`), under Wan-AI's names (also ComfyUI's), or those of NVlabs/rcm.
"""

import common  # noqa: I001  (puts the checkout on the path)
import json
import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict

from rcm_jax import convert
from rcm_jax.convert import adapters
from rcm_jax.models import NETWORKS
from rcm_jax.run import card, handover, weights, workdir
from rcm_jax.convert.files import write_tensors
from rcm_jax.convert.lazy import LazyTensor
from rcm_jax.convert.table import cast
from rcm_jax.util.config import kind_of
from rcm_jax.util.files import as_path, check_new_folder, check_writable, new_folder, write_text

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir of scripts/train.py or convert_checkpoint.py.")
ITEM = flags.DEFINE_enum("item", "ema", ["ema", "student", "fake_score"], "Which network; ema: the averaged student.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Training step of the checkpoint; the newest if not given.")
LAYOUT = flags.DEFINE_string("layout", "diffusers", "official, rcm or diffusers; of an adapter official or peft, too.")
ADAPTER = flags.DEFINE_bool("adapter", False, "Of a student that is an adapter (LoRA) that alone, not merged.")
MERGE = flags.DEFINE_string("merge", None, "A .safetensors file of an adapter (LoRA), merged into what is exported.")
DST = flags.DEFINE_string("dst", None, "The folder to make, new or empty; or a file, if it ends in .safetensors.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    "keep",
    ["keep", *convert.PUBLISHED_DTYPES],
    "Of what is written; modulation, time embedding and norms stay wide.",
)
PIPELINE = flags.DEFINE_bool("pipeline", False, "A folder for diffusers' pipelines: with their scheduler and index.")
AROUND = flags.DEFINE_string("around", None, "Of --pipeline: a published pipeline whose VAE, encoders … are copied.")
BASE = flags.DEFINE_string("base", "", "Of the model card: the repository of the base, in diffusers' layout.")
LICENCE = flags.DEFINE_string("licence", "", "Of the model card: that of the base, as the hub names it.")
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
    check_target(run)
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
        adapter = adapter if DTYPE.value == "keep" else adapter.astype(DTYPE.value)
        names = adapters.write(DST.value, kind, run.model, adapter, LAYOUT.value)
    elif PIPELINE.value:
        names = write_pipeline(run, kind, params)
    else:
        names = write_network(DST.value, run, kind, params, cards(run))
    print(f"{DST.value}: {', '.join(names)}")


def write_network(folder, run, kind: str, params, texts=types.MappingProxyType({})) -> list[str]:
    """The files of a network, and their names; texts: {name: text} of more of them."""
    tensors = convert.to_reference(kind, params, run.model, LAYOUT.value)
    if DTYPE.value != "keep":
        tensors = {name: narrowed(kind, name, tensor, jnp.dtype(DTYPE.value)) for name, tensor in tensors.items()}
    described = convert.MODELS[kind].described(run.model, LAYOUT.value)
    if described and not one_file():
        texts = {"config.json": json.dumps(described, indent=2) + "\n"} | texts
    with common.bytes_bar("writing", common.tally(tensors)[1]) as bar:
        return write_tensors(
            folder,
            tensors,
            shard_bytes=1e9 * (SHARD_GB.value or (10 if LAYOUT.value == "diffusers" else math.inf)),
            metadata={"format": "pt"} | (handover.metadata(run) if has_card(run) else {}),
            extra_files=texts,
            progress=bar.update,
        )


def write_pipeline(run, kind: str, params) -> list[str]:
    """A folder for diffusers' from_pretrained, whole but for what --around does not give; names of its parts."""
    with new_folder(DST.value, last="model_index.json") as temporary:
        write_network(temporary / "transformer", run, kind, params)
        for name in handover.components(run) if AROUND.value else ():
            shutil.copytree(as_path(AROUND.value) / name, temporary / name)
        for name, text in (cards(run) | handover.files(run, whole=bool(AROUND.value))).items():
            write_text(temporary / name, text)
        return sorted(path.name for path in temporary.iterdir())


def has_card(run) -> bool:
    """Whether what is exported is sampled in few steps."""
    return handover.is_student(run) and ITEM.value != "fake_score" and not ADAPTER.value


def cards(run) -> dict[str, str]:
    """{name: text} of the model card beside a student in a folder."""
    if one_file() or not has_card(run):
        return {}
    told = {"base": BASE.value, "licence": LICENCE.value}
    name = as_path(DST.value).name or "student"
    return {"README.md": card.card(run, name, **told, code=PIPELINE.value, whole=bool(AROUND.value))}


def one_file() -> bool:
    return DST.value.endswith(".safetensors")


def check_target(run) -> None:
    """ValueError or OSError unless --dst can be made, and what goes into it is there."""
    if (BASE.value or LICENCE.value) and not cards(run):
        raise ValueError("--base and --licence are for the model card, which a folder with a whole student has")
    if not PIPELINE.value:
        if AROUND.value:
            raise ValueError("--around is for --pipeline")
    elif LAYOUT.value != "diffusers" or ADAPTER.value or one_file():
        raise ValueError("--pipeline is a folder in the layout diffusers, of merged weights: no --adapter, no file")
    else:
        handover.check(run)
        if not has_card(run):
            raise ValueError(f"--pipeline is for students: --item={ITEM.value} is not sampled in few steps")
        lost = [name for name in handover.components(run) if not (as_path(AROUND.value or "") / name).is_dir()]
        if AROUND.value and lost:
            raise ValueError(f"--around={AROUND.value} has no folder {', '.join(lost)}: it must hold a whole pipeline")
    if one_file():
        if LAYOUT.value == "diffusers" and not ADAPTER.value:
            raise ValueError(
                f"--dst={DST.value}: the layout diffusers has a config.json beside its weights: name a folder"
            )
        if as_path(DST.value).is_file():
            raise FileExistsError(f"--dst={DST.value} is there: choose another name")
        check_writable(DST.value)
    else:
        check_new_folder(DST.value)


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
