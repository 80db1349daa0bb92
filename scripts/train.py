"""Train: python scripts/train.py --config=digits.py --workdir=DIR [--config.key=value …]

Pretrains a teacher in DIR/teacher if config.teacher names none, distils it into DIR, and writes DIR/report/ (videos of
latents need config.media.vae_path). Started again on the same DIR it goes on from the newest checkpoint.
A config of a teacher alone, as cifar10.py:teacher, makes one in DIR.
With --recipe=staged it trains by several methods, each from the student of the one before, in DIR/1_dcm, DIR/2_scm,
DIR/3_rcm.

On several hosts start the same command on each: with --distributed where SLURM, Kubernetes, a Cloud TPU or MPI say who
is who, else with --coordinator=HOST:PORT --processes=N --process=I. DIR must be the same folder for all.
"""

import common  # noqa: I001  (puts the checkout on the path)
import re
import sys
import time

import jax
from absl import flags

from configs import methods
from rcm_jax.parallel import distributed
from rcm_jax.run import door, pipeline
from rcm_jax.run.experiment import Experiment
from rcm_jax.train import trainer
from rcm_jax.train.guard import Diverged
from rcm_jax.util.files import as_path, cache_folder, stored

CONFIG = common.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics, samples and the report go.")
CLUSTER = common.cluster_flags()
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", distributed.HEARTBEAT, "Seconds of silence after which a process counts as dead.", lower_bound=1
)
RECIPE = flags.DEFINE_string("recipe", None, "Several methods, one after another: a name in configs/methods.RECIPES.")
PROFILE = flags.DEFINE_string("profile", None, "START:END, steps of the distillation: a trace goes to DIR/profile.")
FROM_STEP = flags.DEFINE_integer(
    "from_step", None, "Go on from the checkpoint of this step; later ones are put aside, not deleted.", lower_bound=0
)
CACHE = flags.DEFINE_string(
    "cache", None, "Folder of compiled programs; none if empty. By default DIR/cache, or one here for a DIR in a store."
)
flags.mark_flags_as_required(["config", "workdir"])


def main():
    """Trains, and writes the reports."""
    started = time.time()
    common.join_cluster(CLUSTER, heartbeat=HEARTBEAT.value)
    say = print if distributed.first() else lambda *_: None
    try:
        run = common.experiment(CONFIG, teachers=True)
        if not isinstance(run, Experiment):
            if RECIPE.value or PROFILE.value:
                raise ValueError("--recipe and --profile are of a distillation, and this config makes a teacher alone")
            pipeline.train_teacher(run, WORKDIR.value, read_cache(), FROM_STEP.value)
            say(f"trained in {(time.time() - started) / 60:.1f} min: {WORKDIR.value}")
            return
        for stage, trained in train_all(run, say):
            say(f"{stage}trained in {(time.time() - started) / 60:.1f} min: {trained.folder}")
            report(trained, started, say)
    except trainer.Interrupted as stop:
        say(stop)
        raise SystemExit(130) from None  # not finished, as a shell says it
    except Diverged as stop:
        print(f"error: {stop}", file=sys.stderr)
        raise SystemExit(3) from None
    except jax.errors.JaxRuntimeError as error:
        if distributed.several():
            distributed.leave(error)
        raise


def train_all(run: Experiment, say):
    """Yields (what to call it, what came of it) of the run or, one after another, of the stages of a recipe."""
    if not RECIPE.value:
        yield "", pipeline.train(run, WORKDIR.value, read_profile(), read_cache(), FROM_STEP.value)
        return
    if PROFILE.value or FROM_STEP.value is not None:
        raise ValueError("--profile and --from_step are for one training: leave --recipe out, or these")
    stages = methods.chain(run, RECIPE.value, as_path(WORKDIR.value))
    for folder, stage in stages.items():  # the last may be refused, too, before the first begins
        door.check(stage, folder)
    for folder, stage in stages.items():
        say(f"{folder.name}: {stage.rcm.name}, {stage.train.steps} iterations")
        yield f"{folder.name}: ", pipeline.train(stage, folder, cache=read_cache())


def read_profile() -> tuple[int, int] | None:
    """The two steps of --profile."""
    if PROFILE.value is None:
        return None
    if not (found := re.fullmatch(r"(\d+):(\d+)", PROFILE.value)):
        raise ValueError(f"--profile={PROFILE.value} must be START:END, two steps such as 100:105")
    return int(found[1]), int(found[2])


def read_cache():
    """The folder of --cache; None if there is to be none, or if JAX knows one already (JAX_COMPILATION_CACHE_DIR)."""
    if CACHE.value is None:
        folder = as_path(WORKDIR.value)
        ours = cache_folder() / "programs" if stored(folder) else folder / "cache"
        return None if jax.config.jax_compilation_cache_dir else ours
    return as_path(CACHE.value) if CACHE.value else None


def report(trained, started: float, say) -> None:
    """Writes the report that goes with how the data are shown; says so where there is none."""
    from rcm_jax.evaluate import reports  # which training does not need

    if reason := reports.no_report(trained.dataset):
        say(reason)
        return
    say(reports.REPORTS[trained.dataset.view](trained))
    if distributed.first():
        folder = trained.folder / "report"
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"{folder}: {files} ({(time.time() - started) / 60:.1f} min in all)")


if __name__ == "__main__":
    common.run(main)
