"""Cosmos-Predict2 0.6B text to image: configs/cosmos_2b.py at another size.

python scripts/convert_checkpoint.py --model=cosmos-0.6b --src=model.pt --dst=cosmos-0.6b
python scripts/train.py --config=cosmos_0_6b.py --config.teacher=cosmos-0.6b --config.data.path=LATENTS \\
    --workdir=DIR

The paper trains 80,000 iterations at a global batch of 1,024 and reports GenEval 0.79 with 4 steps (teacher: 0.81);
this file has not been run at full size. Its latents are those of Cosmos' own image tokenizer, not of the autoencoder of
Wan2.1 that the larger networks have; that one is not here, so scripts/sample.py draws no images of it.
"""

from ml_collections import ConfigDict

from configs import cosmos_2b, machines, methods, wan_1_3b
from rcm_jax.models import cosmos
from rcm_jax.util.config import revise

EXPERIMENT = revise(
    cosmos_2b.EXPERIMENT,
    {
        "model": revise(cosmos.PUBLISHED["cosmos-0.6b"], wan_1_3b.COMPUTED),
        "train.steps": 80_000,
        "train.batch_size": 1024,
        "media": None,
    },
)


def get_config(variant: str = "") -> ConfigDict:
    """cosmos_2b, but for what is set here."""
    return methods.flagged(methods.choose(EXPERIMENT, variant, machines.of("cosmos_0_6b") | {"tiny": cosmos_2b.tiny}))
