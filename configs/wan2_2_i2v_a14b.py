"""Wan2.2 A14B image to video, 832×480, 81 frames: two networks, each distilled on its own part of the noise.

python scripts/convert_checkpoint.py --model=wan2.2-i2v-a14b --src=Wan2.2-I2V-A14B/high_noise_model --dst=high
python scripts/convert_checkpoint.py --model=wan2.2-i2v-a14b --src=Wan2.2-I2V-A14B/low_noise_model --dst=low
python scripts/train.py --config=wan2_2_i2v_a14b.py --config.teacher=high --config.data.path=LATENTS --workdir=HIGH
python scripts/train.py --config=wan2_2_i2v_a14b.py:low --config.teacher=low --config.data.path=LATENTS --workdir=LOW
python scripts/sample.py --checkpoint=HIGH --low=LOW --image=first.png --prompt="it moves" --out=video.mp4 …

LATENTS is a set of videos as scripts/build_dataset.py makes it with --first_frame, of x0 [21, 60, 104, 16], y
[21, 60, 104, 20] and text [512, 4096]. The authors of rCM publish such a student and tell no settings for it: those of
configs/wan_14b.py are taken. It has not been run at full size. `:tiny`, also `:tiny,low`, as in configs/wan_1_3b.py,
for y [2, 4, 6, 8].
"""

from ml_collections import ConfigDict

from configs import methods, wan_1_3b, wan_14b
from rcm_jax.models import wan
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise

EXPERIMENT = revise(
    wan_14b.EXPERIMENT,
    {
        "model": revise(wan.PUBLISHED["wan2.2-i2v-a14b"], wan_1_3b.COMPUTED),
        "rcm.noise_range": (0.9, 1.0),  # of rectified-flow times: those of the first network
        "rcm.guidance": 3.5,  # here and below: Wan2.2's own
        "sampling.teacher_shift": 5.0,
        "sampling.teacher_steps": 40,
    },
)


def low(run: Experiment) -> Experiment:
    """The network for little noise: its rollouts begin with noised data."""
    return revise(run, {"rcm.noise_range": (0.0, run.rcm.noise_range[0])})


def get_config(variant: str = "") -> ConfigDict:
    """wan_14b, but for what is set here."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, {"tiny": wan_1_3b.tiny, "low": low}))
