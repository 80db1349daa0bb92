"""Average anew: python scripts/reconstruct_ema.py --workdir=DIR --std=0.08 --dst=NEW

Makes the power EMA of another width from the snapshots of a run with train.snapshot_every (EDM2, arXiv 2312.02696,
section 3). DIR is a workdir of scripts/train.py; of the teacher that it pretrained, DIR/teacher. NEW becomes a workdir
that sample.py, export_checkpoint.py and --config.teacher (--config.start, if DIR is of a student) can name.
"""

import common  # noqa: I001  (puts the checkout on the path)

import jax
from absl import flags, logging

from rcm_jax.run import workdir
from rcm_jax.run.weights import base_folder
from rcm_jax.run.experiment import Experiment, Pretraining
from rcm_jax.train import averages, checkpoint
from rcm_jax.util.config import revise
from rcm_jax.util.files import check_new_folder

WORKDIR = flags.DEFINE_string("workdir", None, "A workdir with snapshots.")
STD = flags.DEFINE_float("std", None, "The relative width of the average.")
STEP = flags.DEFINE_integer("step", None, "The step of a snapshot, where the average ends; the newest if not given.")
DST = flags.DEFINE_string("dst", None, "The workdir to make: new or empty.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say of what it would be made, and how well that fits; write nothing.")
flags.mark_flags_as_required(["workdir", "std", "dst"])
LEAST = 1e-9  # of a coefficient: what has less is not read


def main():
    """Reads snapshots, one at a time, and writes a workdir of their sum."""
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to whoever trains on them
    config = workdir.read(WORKDIR.value)
    averages.power_ema_exponent(STD.value)
    check_averaged(config)
    check_new_folder(DST.value)
    snapshots = checkpoint.snapshots_of(WORKDIR.value)
    steps = sorted({step for step, _, _ in snapshots})
    last = steps[-1] if STEP.value is None else STEP.value
    if last not in steps:
        raise ValueError(f"no snapshot of step {last} in {WORKDIR.value}; steps there: {', '.join(map(str, steps))}")
    config = described(config, last)
    snapshots = [snapshot for snapshot in snapshots if snapshot[0] <= last]
    _, counts, stds = zip(*snapshots, strict=True)
    weights, error = averages.coefficients(counts, stds, counts[-1], STD.value)
    used = [(*snapshot, w) for snapshot, w in zip(snapshots, weights, strict=True) if abs(w) > LEAST]
    for step, count, std, weight in used:
        print(f"{weight:+.6f} × width {std:g} at step {step} ({count} updates)")
    print(f"width {STD.value:g} at step {last}: its weights over time are met to {error:.2%} (L2)")
    if DRY_RUN.value:
        print("dry run: nothing was written")
        return
    read = (checkpoint.restore_params(WORKDIR.value, str(std), step, kind=checkpoint.SNAPSHOTS)[0]
            for step, _, std, _ in used)  # fmt: skip
    params = averages.combined([weight for *_, weight in used], read)
    logging.set_verbosity(logging.ERROR)  # orbax warns of the format that is chosen on purpose
    workdir.write_converted(DST.value, config, params, last)
    print(f"{DST.value}: done")


def check_averaged(config) -> None:
    """ValueError if a workdir has no power EMAs."""
    if not isinstance(config, Pretraining):
        raise ValueError(f"{WORKDIR.value} holds converted weights: there is nothing to average")
    if not (config.rcm if isinstance(config, Experiment) else config.pretrain.method).widths:
        raise ValueError(
            f"{WORKDIR.value} has an EMA with a half-life alone, of which no width is made: train with ema_tracks"
        )


def described(config, step: int):
    """The config of the workdir that is made: as that of the run, had it had this average and ended at that step."""
    method, train = ("rcm", "train") if isinstance(config, Experiment) else ("pretrain.method", "pretrain.train")
    values = {"std": STD.value, "half_life": None, "ramp": None, "tracks": ()}
    own = {f"{train}.steps": step, f"{train}.snapshot_every": 0}
    if workdir.adapter_of(config):  # whose base stays where it is
        own["teacher"] = str(base_folder(WORKDIR.value, config))
    return revise(config, own | {f"{method}.ema_{name}": value for name, value in values.items()})


if __name__ == "__main__":
    common.run(main)
