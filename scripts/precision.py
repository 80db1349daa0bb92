"""What narrow precision costs in F and in its tangent dF of a network: a picture, a table and, if asked, JSON.

    python scripts/precision.py --out=docs/precision.png     # Wan 1.3B: 7 GB, minutes on two cores
    python scripts/precision.py --model=cosmos-0.6b --out=docs/precision_cosmos.png
    python scripts/precision.py --out=p.png --layers=2 --repeats=1 --smooth=0 --modulation=1

rcm_jax.evaluate.precision says what is measured, and of which weights.
"""

import common  # noqa: I001  (puts the checkout on the path)
import dataclasses
import json
import platform
import resource
import time

import jax
from absl import flags

from rcm_jax.evaluate.precision import KINDS, PUBLISHED, draw, mean_square, study, summary
from rcm_jax.evaluate.table import format_table
from rcm_jax.media.picture import save_figure
from rcm_jax.util.extras import require
from rcm_jax.util.files import check_writable, write_text

OUT = flags.DEFINE_string("out", None, "The picture, a .png.", required=True)
OVERWRITE = common.overwrite_flag()
JSON = flags.DEFINE_string("json", None, "Also write all numbers there.")
MODEL = flags.DEFINE_enum("model", "wan-1.3b", list(PUBLISHED), "Sizes of the network.")
LAYERS = flags.DEFINE_integer("layers", None, "Blocks; all of the model's if not given.")
GRID = flags.DEFINE_list("grid", ["2", "8", "8"], "Frames, rows and columns of latents.")
# Settings of the study.
NUMBERS = [
    flags.DEFINE_integer("tokens", 16, "Of text."),
    flags.DEFINE_integer("times", 16, "From clean to noisy."),
    flags.DEFINE_integer("repeats", 2, "With other noise and text, and times between the times."),
    flags.DEFINE_integer("seed", 0, "Of weights and inputs."),
    flags.DEFINE_float("smooth", 30.0, "Thousandths of tau over which F varies; 0: as initialised."),
    flags.DEFINE_float("modulation", 8.0, "Factor on the modulation by the time."),
]


def main():
    """Measures, and writes the picture, the table and the record."""
    start = time.perf_counter()
    require("matplotlib", "demo", "the picture")
    if not OUT.value.endswith(".png"):
        raise ValueError(f"--out {OUT.value} must end in .png")
    for path in filter(None, (OUT.value, JSON.value)):
        check_writable(path, OVERWRITE.value)
    if len(GRID.value) != 3 or not all(size.isdecimal() for size in GRID.value):
        raise ValueError(f"--grid={','.join(GRID.value)} must be frames, rows and columns, e.g. 2,8,8")
    settings: dict = {"grid": tuple(map(int, GRID.value))} | {flag.name: flag.value for flag in NUMBERS}
    config = PUBLISHED[MODEL.value]
    layers = KINDS[type(config)].layers
    if LAYERS.value is not None:
        config = dataclasses.replace(config, **{layers: LAYERS.value})
    result = study(config, **settings)
    what = f"{MODEL.value}, {getattr(config, layers)} layers, untrained "
    what += f"(smooth {settings['smooth']:g}, modulation {settings['modulation']:g})"
    save_figure(OUT.value, draw(result, f"What bfloat16 costs: {what}"))
    made = {"jax": jax.__version__, "python": platform.python_version(), "backend": jax.default_backend()}
    used = {"seconds": time.perf_counter() - start, "peak_gib": peak_gib()}
    if JSON.value:
        record = {"model": dataclasses.asdict(config), **settings, **made, **used, **result}
        write_text(JSON.value, json.dumps(record, indent=1, default=lambda array: array.tolist()) + "\n")
    print(f"{what}; Python {made['python']}, JAX {made['jax']}, {made['backend']}")
    print("float32, rms: " + ", ".join(f"{name} {mean_square(rms):.3g}" for name, rms in result["rms"].items()))
    print("relative error to float32, percent")
    print(format_table(summary(result)))
    print(f"{used['seconds']:.0f} s, peak memory {used['peak_gib']:.1f} GiB; {OUT.value}")


def peak_gib() -> float:
    """Most resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if platform.system() == "Darwin" else 2**20)


if __name__ == "__main__":
    common.run(main)
