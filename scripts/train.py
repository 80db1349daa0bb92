"""Train: python scripts/train.py --config=configs/digits.py --workdir=DIR [--config.key=value …]

Pretrains a teacher in DIR/teacher if config.teacher names none, distils it into DIR, and writes DIR/report/ for data
that are pictures of classes or a mixture. Started again on the same DIR it goes on from the newest checkpoint.
"""

import common  # noqa: I001  (puts the checkout on the path)
import time

from absl import flags

from rcm_jax import pipeline, trainer
from rcm_jax.data import DigitsConfig, MixtureConfig
from rcm_jax.evaluate.distillation import write_distillation_report
from rcm_jax.evaluate.mixture_report import write_mixture_report

CONFIG = common.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics, samples and the report go.")
flags.mark_flags_as_required(["config", "workdir"])
REPORTS = {DigitsConfig: write_distillation_report, MixtureConfig: write_mixture_report}


def main():
    started = time.time()
    try:
        trained = pipeline.train(CONFIG.value.to_dict(), WORKDIR.value)
    except trainer.Interrupted as stop:
        print(stop)
        raise SystemExit(130) from None  # not finished, as a shell says it
    print(f"trained in {(time.time() - started) / 60:.1f} min: {WORKDIR.value}")
    if write_report := REPORTS.get(type(trained.run.data)):
        print(write_report(trained))
        print(f"{trained.folder / 'report'}: report.png, report.json ({(time.time() - started) / 60:.1f} min in all)")


if __name__ == "__main__":
    common.run(main)
