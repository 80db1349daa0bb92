"""Wan2.1 14B image to video, 832×480, 81 frames, distilled with the settings of text to video.

python scripts/convert_checkpoint.py --model=wan-i2v-14b --src=Wan2.1-I2V-14B-480P --dst=wan-i2v-14b
python scripts/train.py --config=wan_i2v_14b.py --config.teacher=wan-i2v-14b --config.data.path=LATENTS --workdir=DIR

LATENTS is a set of videos as scripts/build_dataset.py makes it with --first_frame and --clip, of x0 [21, 60, 104, 16],
y [21, 60, 104, 20], clip_features [257, 1280] and text [512, 4096]. The authors of rCM tell no settings for this
network: those of configs/wan_14b.py are taken. It has not been run at full size. `:tiny` as in configs/wan_1_3b.py, for
y [2, 4, 6, 8] and clip_features [257, 16].
"""

from ml_collections import ConfigDict

from configs import methods, wan_1_3b, wan_14b
from rcm_jax.models import clip_vision, wan
from rcm_jax.util.config import revise

EXPERIMENT = revise(
    wan_14b.EXPERIMENT,
    {
        "model": revise(wan.PUBLISHED["wan-i2v-14b"], wan_1_3b.COMPUTED),
        "media.image_encoder": clip_vision.PUBLISHED["wan-clip-vit-h"],
        "sampling.teacher_shift": 3.0,  # Wan's own for 480p; it has 5 for 720p
    },
)


def get_config(variant: str = "") -> ConfigDict:
    """wan_14b, but for what is set here."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, {"tiny": wan_1_3b.tiny}))
