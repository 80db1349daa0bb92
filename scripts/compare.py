"""Compare: python scripts/compare.py --workdir=DIR [--seeds=0,1,2] [--config.key=value …]

Trains every method on the mixture of configs/mixture.py, with equally many updates of the student from one start, and
writes DIR/comparison/: samples over the true density, and a table of distances to the exact teacher. lambda is the
weight of DMD over that of the consistency loss, in units of sqrt(2e6/D), with which its gradient grows. Started again
on the same DIR it goes on where it was stopped.
"""

import common  # noqa: I001  (puts the checkout on the path)
import math
import pathlib
import time

import jax
from absl import flags
from ml_collections import config_flags

from configs import methods
from rcm_jax.train import checkpoint, trainer
from rcm_jax.run import pipeline
from rcm_jax.evaluate import mixture_report
from rcm_jax.evaluate.mixture import evaluate
from rcm_jax.train.steps import student_updates

CONFIG = config_flags.DEFINE_config_file(
    "config", str(pathlib.Path(__file__).parent.parent / "configs/mixture.py"), "A config of rCM on a mixture."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs and the comparison go.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of every method for each.")
flags.mark_flags_as_required(["workdir"])

LAMBDAS = (0.001, 0.01, 0.1, 1.0)
RUNS = {"sCM, λ = 0": ("scm", None), "dCM": ("dcm", None), "DMD": ("dmd", None)}
RUNS |= {f"rCM, λ = {value:g}": ("rcm", value) for value in LAMBDAS}
POINTS = 8  # of the curves


def values_of(method: str, weight: float | None, seed: int, start: str) -> dict:
    """The config of one run; it starts from the network in `start`, or ("") pretrains one."""
    config = CONFIG.value.copy_and_resolve_references()
    config.seed = seed
    config.teacher = start
    if weight is not None:
        features = 2
        config.rcm.dmd.scale = weight * math.sqrt(2e6 / features) * config.rcm.consistency.scale
    methods.METHODS[method](config)
    config.train.keep = POINTS
    config.train.checkpoint_every = max(1, config.train.steps // POINTS)
    return config.to_dict()


def run_seed(folder: pathlib.Path, seed: int):
    """Yields (name, judge, trained) of every run."""
    start, judge = "", None
    for name, (method, weight) in RUNS.items():
        workdir = folder / (method if weight is None else f"{method}_{weight:g}")
        trained = pipeline.train(values_of(method, weight, seed, start), workdir)
        start = start or str(trained.teacher_folder)
        judge = judge or mixture_report.make_judge(trained.run, trained.network)
        yield name, judge, trained


def curve(judge, trained) -> list[tuple[int, float]]:
    """(updates of the student, map error of one step) at every checkpoint that is kept."""
    abstract = checkpoint.abstract_like(trained.state.ema, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with checkpoint.open_manager(trained.folder) as manager:
        steps = sorted(manager.all_steps())
    students = [checkpoint.restore_item(trained.folder, "ema", abstract, step) for step in steps]
    errors = [evaluate(judge.samples(ema)[1], judge.reference)["map_error"] for ema in students]
    return [(student_updates(trained.run.rcm, step), error) for step, error in zip(steps, errors, strict=True)]


def main():
    started = time.time()
    config = CONFIG.value
    if config.data.kind != "mixture" or config.rcm.consistency is None or config.rcm.dmd is None:
        raise ValueError("--config must be of rCM on a mixture: the other methods are made from it, so name none")
    folder = pathlib.Path(WORKDIR.value)
    results, pictures, curves = {mixture_report.FLOOR: []}, {}, {}
    try:
        for seed in map(int, SEEDS.value):
            for name, judge, trained in run_seed(folder / f"seed{seed}", seed):
                samples = judge.samples(trained.state.ema)
                for steps, points in samples.items():
                    row = results.setdefault(f"{name}, {steps} step{'s' * (steps > 1)}", [])
                    row.append(evaluate(points, judge.reference))
                if name not in pictures:
                    pictures[name] = [mixture_report.picture(judge.reference, x) for x in samples.values()]
                    curves[name] = curve(judge, trained)
            results[mixture_report.FLOOR].append(mixture_report.floor(judge.reference))
    except trainer.Interrupted as stop:
        print(stop)
        raise SystemExit(130) from None
    plots = {"map error of one step": {}, "map error of one step, rCM": {}}
    for name, points in curves.items():
        plots["map error of one step" + ", rCM" * name.startswith("rCM")][name] = points
    print(mixture_report.write_comparison(folder / "comparison", results, pictures, plots))
    print(f"{folder / 'comparison'}: report.png, report.json ({(time.time() - started) / 60:.1f} min)")


if __name__ == "__main__":
    common.run(main)
