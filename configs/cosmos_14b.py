"""Cosmos-Predict2 14B text to image: configs/cosmos_2b.py at another size.

python scripts/convert_checkpoint.py --model=cosmos-14b --src=model.pt --dst=cosmos-14b
python scripts/train.py --config=configs/cosmos_14b.py --config.teacher=cosmos-14b --config.data.path=LATENTS \\
    --workdir=DIR

The paper trains 25,000 iterations at a global batch of 256 and reports GenEval 0.83 with 4 steps (teacher: 0.84); this
file has not been run at full size.
"""

from ml_collections import ConfigDict

from configs import cosmos_2b, methods


def get_config(variant: str = "") -> ConfigDict:
    """cosmos_2b, but for what is set here."""
    config = cosmos_2b.get_config()
    config.model.update(cosmos_2b.model("cosmos-14b"))
    config.train.update(steps=25_000, batch_size=256)
    config.sampling.sigma_max = 800.0
    return methods.choose(config, variant, {"tiny": cosmos_2b.tiny})
