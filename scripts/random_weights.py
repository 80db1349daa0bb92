"""Random weights in the layouts of published ones, to try every command without a download.

python scripts/random_weights.py --config=wan_1_3b.py:tiny --out=DIR

DIR then has a teacher (a workdir), a vae and, for configs with text, a text_encoder and a tokenizer, for image to video
of Wan2.1 a clip, for the flags of build_dataset.py, train.py and sample.py. What comes out is noise. Meant for `:tiny`:
a full-size config takes as many GB as the real weights.
"""

import common  # noqa: I001  (puts the checkout on the path)
import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
from absl import flags, logging

from rcm_jax import convert
from rcm_jax.convert.files import write_tensors
from rcm_jax.run import workdir
from rcm_jax.run.experiment import Predictor
from rcm_jax.run.program import make_network, zeros
from rcm_jax.util.files import as_path, new_folder

CONFIG = common.config_flag("The experiment whose networks are made.")
OUT = flags.DEFINE_string("out", None, "A new or empty folder.")
flags.mark_flags_as_required(["config", "out"])

WORDS = ["<pad>", "</s>", "<unk>"]  # and as many numbers as the encoder has tokens


def main():
    """Draws and writes."""
    run = common.experiment(CONFIG)
    if run.media is None:
        raise ValueError("this config has no media: there is nothing around its network")
    logging.set_verbosity(logging.ERROR)  # orbax warns of the format that is chosen on purpose
    with new_folder(OUT.value) as folder:
        encoder = run.media.text_encoder
        around = {"vae": run.media.vae, "text_encoder": encoder, "clip": run.media.image_encoder}
        for name, config in around.items():
            if config is None:
                continue
            kind = convert.name_of(config)
            layout, model = next(iter(convert.MODELS[kind].layouts(config))), convert.MODELS[kind]
            write_tensors(folder / name, convert.to_reference(kind, draw(model.init, config), config, layout))
        if encoder:
            write_tokenizer(folder / "tokenizer", encoder.vocab_size)
        teacher = Predictor(run.model, run.parametrization, run.time_scale)
        network = make_network(run, zeros(run, run.data.shape).first)
        workdir.write_converted(folder / "teacher", teacher, draw(lambda config, key: network.init(key), run.model))
    print(f"{OUT.value}: {', '.join(sorted(path.name for path in as_path(OUT.value).iterdir()))}, all random")


def draw(init, config) -> dict:
    """Parameters in numpy, none of them zero: normal, of variance 1/20, and scales around 1."""
    rng, abstract = (
        np.random.default_rng(0),
        nn.meta.unbox(jax.eval_shape(lambda k: init(config, k), jax.random.key(0))),
    )

    def one(path, leaf):
        return ((path[-1].key == "scale") + 0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract)


def write_tokenizer(folder: pathlib.Path, size: int) -> None:
    """A tokenizer.json of so many words: every text is unknown words, and an end."""
    words = [*WORDS, *map(str, range(size - len(WORDS)))]
    ending = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    values = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing", "single": ending, "pair": ending,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(values))


if __name__ == "__main__":
    common.run(main)
