"""Wan2.2 A14B text to video, 832×480, 81 frames: two networks, each distilled on its own part of the noise.

python scripts/convert_checkpoint.py --model=wan-14b --src=Wan2.2-T2V-A14B/high_noise_model --dst=high
python scripts/convert_checkpoint.py --model=wan-14b --src=Wan2.2-T2V-A14B/low_noise_model --dst=low
python scripts/train.py --config=wan2_2_t2v_a14b.py --config.teacher=high --config.data.path=LATENTS --workdir=HIGH
python scripts/train.py --config=wan2_2_t2v_a14b.py:low --config.teacher=low --config.data.path=LATENTS --workdir=LOW
python scripts/sample.py --checkpoint=HIGH --low=LOW --prompt="a cat" --out=video.mp4 …

The networks have the layout of Wan2.1 14B. LATENTS is a set as for configs/wan_14b.py, whose settings are taken: nobody
tells others. It has not been run at full size. `:tiny`, also `:tiny,low`, as in configs/wan_1_3b.py. The teachers are
sampled together by --checkpoint=high --low=low --guidance=4 --low_guidance=3.
"""

from ml_collections import ConfigDict

from configs import methods, wan2_2_i2v_a14b, wan_1_3b, wan_14b
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise

EXPERIMENT = revise(
    wan_14b.EXPERIMENT,
    {
        "rcm.noise_range": (0.875, 1.0),  # of rectified-flow times: those of the first network
        "rcm.guidance": 4.0,  # here and below: Wan2.2's own
        "sampling.teacher_shift": 12.0,
        "sampling.teacher_steps": 40,
    },
)


def low(run: Experiment) -> Experiment:
    """The network for little noise, with a guidance of its own."""
    return revise(wan2_2_i2v_a14b.low(run), {"rcm.guidance": 3.0})


def get_config(variant: str = "") -> ConfigDict:
    """wan_14b, but for what is set here."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, {"tiny": wan_1_3b.tiny, "low": low}))
