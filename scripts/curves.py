"""Draws what rcm_jax.train.stability watches, from the metrics of one or several workdirs, two lines of panels each.

python scripts/curves.py --run=digits=runs/digits --run=mixture=runs/mixture --out=curves.png
"""

import common  # noqa: I001  (puts the checkout on the path)

from absl import flags

from rcm_jax.evaluate import curves
from rcm_jax.media.picture import save_figure
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.files import check_writable

RUN = flags.DEFINE_multi_string("run", None, "NAME=WORKDIR; may be given several times.", required=True)
OUT = flags.DEFINE_string("out", None, "A PNG file.", required=True)
OVERWRITE = common.overwrite_flag()


def main():
    """Draws the metrics of the runs."""
    check_writable(OUT.value, OVERWRITE.value)
    runs = {}
    for run in RUN.value:
        name, _, folder = run.partition("=")
        runs[name] = read_metrics(folder)
        if not runs[name]:
            raise ValueError(f"--run={run}: there is no metrics.jsonl in {folder or name}; write --run=NAME=WORKDIR")
    save_figure(OUT.value, curves.draw(runs))


if __name__ == "__main__":
    common.run(main)
