"""Names of the U-Nets of EDM. Layout:

"official": the state dict of NVlabs/edm's SongUNet or DhariwalUNet; a published network has it under "model.". Its
constant filters are not read; the random frequencies of NCSN++ are, as a parameter that is not trained.
"""

import re

from rcm_jax import models
from rcm_jax.convert.table import CONV, MATRIX, SAME, Conversion, Rule, shapes_of
from rcm_jax.models import edm_unet
from rcm_jax.models.edm_unet import EdmConfig
from rcm_jax.util.config import build

FORMS = {4: CONV, 2: MATRIX, 1: SAME}  # by the axes of an array
SUFFIXES = {"kernel": "weight", "scale": "weight", "bias": "bias", "freqs": "freqs"}
IGNORED = re.compile(r".*\.resample_filter")
# Of the reference's keyword arguments, those that make no difference to the function that a network is.
OTHERS = ("dropout", "label_dropout", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
OURS = ("adaptive_scale", "double_norm", "guidance_input")
COMPUTED = ("dropout_resolution", "dtype", "remat", "attention")  # ours as well, and the same network
SONG = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")  # ADM has none


def config_of(kwargs: dict, **changes) -> EdmConfig:
    """The config of the reference's keyword arguments of EDMPrecond, with what they leave at its defaults.

    changes: of our own fields, e.g. dtype. ValueError for arguments that are not known.
    """
    rest = {name: value for name, value in kwargs.items() if name not in OTHERS}
    defaults = edm_unet.ADM if rest.get("model_type") == "DhariwalUNet" else {}
    return build(EdmConfig, defaults | rest | changes, "EDMPrecond")


def _name(path: str) -> str:
    """enc_8x8_block0/conv0/kernel as enc.8x8_block0.conv0.weight."""
    *modules, leaf = re.sub(r"^(enc|dec)_", r"\1/", path).split("/")
    return ".".join([*modules, SUFFIXES[leaf]])


def layouts(config: EdmConfig) -> dict[str, list[Rule]]:
    """The rules of the one layout: our names are the reference's."""
    shapes = shapes_of(models.init, config)
    return {"official": [Rule(path, _name(path), FORMS[len(shape)]) for path, shape in shapes.items()]}


def described(config: EdmConfig, layout: str) -> dict:
    """The keyword arguments of EDMPrecond, and those of OURS that are not as there; config_of takes both."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    plain = config_of({name: value for name, value in values.items() if name not in OURS})
    left_out = COMPUTED if config.family.song else COMPUTED + SONG
    return {
        name: value
        for name, value in values.items()
        if name not in left_out and (name not in OURS or value != getattr(plain, name))
    }


CONVERSION = Conversion(edm_unet.NETWORK, models.init, layouts, described, ("map_", "norm"), IGNORED)
