"""Wan2.2 TI2V-5B, 1280×704, 121 frames, distilled with the settings of Wan2.1: videos that begin with an image.

python scripts/convert_checkpoint.py --model=wan2.2-ti2v-5b --src=Wan2.2-TI2V-5B --dst=wan2.2-ti2v-5b
python scripts/train.py --config=wan2_2_ti2v_5b.py --config.teacher=wan2.2-ti2v-5b --config.data.path=LATENTS \\
    --workdir=DIR
python scripts/sample.py --checkpoint=DIR --image=first.png --prompt="it moves" --out=video.mp4 …

LATENTS is a set of videos as scripts/build_dataset.py makes it, of 31 frames [31, 44, 80, 48] and text [512, 4096]: the
first frame is given to the network, clean, and x0 are the 30 after it. `:text` makes all 31 from text, with the same
weights. Nobody tells settings for this network: those of configs/wan_14b.py are taken. It has not been run at full
size. `:tiny` as in configs/wan_1_3b.py, for 3 frames.
"""

from ml_collections import ConfigDict

from configs import methods, wan_1_3b, wan_14b
from rcm_jax.models import wan, wan22_vae
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise

EXPERIMENT = revise(
    wan_14b.EXPERIMENT,
    {
        "model": revise(wan.PUBLISHED["wan2.2-ti2v-5b"], wan_1_3b.COMPUTED | {"known_frames": 1}),
        "data.shape": (30, 44, 80, 48),
        "data.known_frames": 1,
        "mesh": MeshConfig(data=1, fsdp=-1),
        "media.vae": wan22_vae.PUBLISHED["wan2.2-vae"],
        "media.fps": 24,  # here and below: Wan2.2's own
        "rcm.guidance": 5.0,
        "sampling.teacher_shift": 5.0,
    },
)


def text(run: Experiment) -> Experiment:
    """Text to video: no frame is known."""
    t, *rest = run.data.shape
    shape = (t + run.data.known_frames, *rest)
    return revise(run, {"model.known_frames": 0, "data.known_frames": 0, "data.shape": shape})


def get_config(variant: str = "") -> ConfigDict:
    """wan_14b, but for what is set here."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, {"tiny": wan_1_3b.tiny, "text": text}))
