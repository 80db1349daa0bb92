"""Convert published weights: python scripts/convert_checkpoint.py --model=wan-1.3b --src=FILE_OR_FOLDER --dst=DIR

The source is .safetensors (one file, or shards with an index), .pth, .pt or a .pkl of NVlabs, in the layout of Wan-AI,
NVlabs (rcm, edm), cosmos-predict2 or diffusers, seen by the names. DIR becomes a workdir that config.teacher can name.
"""

import common  # noqa: I001  (puts the checkout on the path)

import jax
import jax.numpy as jnp
from absl import flags, logging

from rcm_jax.run import workdir
from rcm_jax.run.experiment import Predictor
from rcm_jax import convert
from rcm_jax.convert.files import open_tensors
from rcm_jax.util.files import check_new_folder

MODEL = flags.DEFINE_string("model", None, f"{', '.join(convert.PUBLISHED)}, or a JSON file as config.model.")
SRC = flags.DEFINE_string("src", None, "A .safetensors, .safetensors.index.json, .pth, .pt or .pkl file, or a folder.")
DST = flags.DEFINE_string("dst", None, "The workdir to make: new or empty.")
DTYPE = flags.DEFINE_enum("dtype", "keep", ["keep", *convert.PUBLISHED_DTYPES], "Of the parameters that are written.")
PREFIX = flags.DEFINE_string("prefix", None, "Take the tensors under this prefix alone, e.g. net_ema.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be done, check all names and shapes, write nothing.")
flags.mark_flags_as_required(["model", "src", "dst"])


def main():
    """Reads published weights, and writes a workdir of them."""
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to whoever trains on them
    kind, config = convert.named(MODEL.value)
    check_new_folder(DST.value)
    tensors = open_tensors(SRC.value)
    if PREFIX.present:
        tensors = convert.under_prefix(tensors, PREFIX.value)
    tensors = convert.parameters(kind, tensors)
    layout = convert.recognise(kind, tensors, config)
    dtype = None if DTYPE.value == "keep" else jnp.dtype(DTYPE.value)
    count, size, held = common.tally(tensors)
    print(f"{SRC.value}: {MODEL.value} in the layout {layout!r}, {len(tensors)} tensors, {count:,} parameters, {held}")
    print(f"{DST.value}: to be a workdir of its parameters in {dtype or held}")
    if dtype and any(tensor.dtype.itemsize > dtype.itemsize for tensor in tensors.values()):
        print(f"a student will start from weights rounded to {dtype}; config.teacher_dtype narrows the teacher alone")
    if DRY_RUN.value:
        print("dry run: all names and shapes fit; nothing was written")
        return
    with common.bytes_bar("reading", size) as bar:
        params = convert.from_reference(kind, tensors, config, dtype=dtype, progress=bar.update)
    print("writing")
    logging.set_verbosity(logging.ERROR)  # orbax warns of the format that is chosen on purpose
    workdir.write_converted(DST.value, Predictor(config), params)
    print(f"{DST.value}: done; --config.teacher={DST.value} distils it")


if __name__ == "__main__":
    common.run(main)
