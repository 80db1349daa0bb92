"""Names of the InceptionV3 that FID is computed with. Layout:

"fidelity": pytorch-fid and torch-fidelity, whose published file is pt_inception-2015-12-05-6726825d.pth.
"""

import re

from rcm_jax.convert.table import Conversion, Rule, rules_of_modules, shapes_of
from rcm_jax.models import inception
from rcm_jax.models.inception import InceptionConfig

KINDS = {"conv": "kernel", "bn": "batch_norm", "fc": "dense"}  # of modules, by their names


def layouts(config: InceptionConfig) -> dict[str, list[Rule]]:
    """The rules: modules have the same names here and there."""
    modules = sorted({path.rpartition("/")[0] for path in shapes_of(inception.NETWORK.init, config)})
    rows = [(module, module.replace("/", "."), KINDS[module.split("/")[-1]]) for module in modules]
    return {"fidelity": rules_of_modules(rows)}


IGNORED = re.compile(r".*\.num_batches_tracked")
CONVERSION = Conversion(inception.NETWORK, inception.NETWORK.init, layouts, lambda config, layout: {}, ignored=IGNORED)
