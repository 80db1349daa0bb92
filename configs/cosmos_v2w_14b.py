"""Cosmos-Predict2 14B video to world, 1280×704, 93 frames, distilled to 1 to 4 steps: videos that begin with an image.

python scripts/convert_checkpoint.py --model=cosmos-v2w-14b --src=model-720p-16fps.pt --dst=cosmos-v2w-14b
python scripts/train.py --config=cosmos_v2w_14b.py --config.teacher=cosmos-v2w-14b --config.data.path=LATENTS \\
    --workdir=DIR

All else as in configs/cosmos_v2w_2b.py. It has not been run at full size.
"""

from ml_collections import ConfigDict

from configs import cosmos_2b, cosmos_v2w_2b, methods, wan_1_3b
from rcm_jax.models import cosmos
from rcm_jax.util.config import revise

EXPERIMENT = revise(cosmos_v2w_2b.EXPERIMENT, {"model": revise(cosmos.PUBLISHED["cosmos-v2w-14b"], wan_1_3b.COMPUTED)})


def get_config(variant: str = "") -> ConfigDict:
    """cosmos_v2w_2b, but for the network."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, {"tiny": cosmos_2b.tiny}))
