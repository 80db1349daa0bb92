"""Names of the EDM2 networks. The layout "official" is the state dict of Precond in NVlabs/edm2.

Its files are pickles of the whole object; names and forms follow from ours by one rule each. What sCM adds has names of
the same kind: unet.emb_guidance.weight and unet.guidance_gain.
"""

from collections.abc import Mapping

from rcm_jax import models
from rcm_jax.convert.table import CONV, MATRIX, SAME, Conversion, Rule, shapes_of
from rcm_jax.models import edm2_unet
from rcm_jax.models.edm2_unet import Edm2Config
from rcm_jax.util.config import build, to_mapping

FORMS = {2: MATRIX, 4: CONV}  # by axes; gains, frequencies and phases stay as they are
# Keywords of Precond that are no sizes: how it computes, what the data's deviation is, what training drops.
OTHERS = ("class_name", "use_fp16", "sigma_data", "dropout")
OURS = ("dtype", "remat", "attention", "dropout_resolution")  # which say how to compute, too


def name_of(path: str) -> str:
    """enc_64x64_block0/conv_res0/kernel is unet.enc.64x64_block0.conv_res0.weight."""
    for ours, theirs in (("enc_", "enc."), ("dec_", "dec."), ("logvar/", "logvar_")):
        path = theirs + path.removeprefix(ours) if path.startswith(ours) else path
    path = path.replace("/kernel", "/weight").replace("/", ".")
    return path if path.startswith("logvar_") else f"unet.{path}"


def layouts(config: Edm2Config) -> dict[str, list[Rule]]:
    """The rules of the layout."""
    shapes = shapes_of(models.init, config)
    return {"official": [Rule(path, name_of(path), FORMS.get(len(shape), SAME)) for path, shape in shapes.items()]}


def config_of(kwargs: Mapping) -> Edm2Config:
    """The sizes of a network from the keywords that Precond was made with; ValueError for what is not built."""
    sizes = {name: value for name, value in kwargs.items() if name not in OTHERS}
    if (taps := list(sizes.pop("resample_filter", (1, 1)))) != [1, 1]:
        raise ValueError(f"resample_filter {taps} is not supported: it must be [1, 1]")
    return build(Edm2Config, sizes, "Precond")


def described(config: Edm2Config, layout: str) -> dict:
    """Sizes as `config_of` reads them."""
    return {name: value for name, value in to_mapping(config).items() if name not in OURS}


# Parts of names of tensors that an export does not narrow: all that computes embedding and modulation, and the output.
WIDE = ("emb_", "gain", "logvar_", "out_conv")
CONVERSION = Conversion(edm2_unet.NETWORK, models.init, layouts, described, WIDE)
