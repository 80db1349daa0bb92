"""Cosmos-Predict2 2B video to world, 1280×704, 93 frames, distilled to 1 to 4 steps: videos that begin with an image.

python scripts/convert_checkpoint.py --model=cosmos-v2w-2b --src=model-720p-16fps.pt --dst=cosmos-v2w-2b
python scripts/train.py --config=cosmos_v2w_2b.py --config.teacher=cosmos-v2w-2b --config.data.path=LATENTS \\
    --workdir=DIR
python scripts/sample.py --checkpoint=DIR --image=first.png --prompt="it moves" --out=video.mp4 …

LATENTS is a set of videos as scripts/build_dataset.py makes it, of 24 frames [24, 88, 160, 16] and text [512, 1024]
(T5-11B): the first frame is given to the network, and x0 are the 23 after it. Two may be given:
--config.model.known_frames=2 --config.data.known_frames=2 and a data.shape of 22 frames; then --image names a video of
5 frames or more. Nobody tells settings for this network: those of configs/cosmos_2b.py are taken, with the paper's rule
for the noise of videos. It has not been run at full size. `:tiny` as in configs/cosmos_2b.py, for 3 frames.
"""

from ml_collections import ConfigDict

from configs import cosmos_2b, methods, wan_1_3b
from rcm_jax.method.trigflow import LogNormal
from rcm_jax.models import cosmos
from rcm_jax.util.config import revise

EXPERIMENT = revise(
    cosmos_2b.EXPERIMENT,
    {
        "model": revise(cosmos.PUBLISHED["cosmos-v2w-2b"], wan_1_3b.COMPUTED),
        "data.shape": (23, 88, 160, 16),
        "data.known_frames": 1,
        "rcm.guidance": 8.0,  # NVIDIA's sampler has 7, counted from 0
        "rcm.consistency.time": LogNormal(0.8, 1.6),  # the paper: −0.8 + ln sqrt(24)
    },
)


def get_config(variant: str = "") -> ConfigDict:
    """cosmos_2b, but for what is set here."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, {"tiny": cosmos_2b.tiny}))
