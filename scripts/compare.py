"""Compare: python scripts/compare.py --workdir=DIR [--seeds=0,1,2] [--runs=scm,staged] [--config.key=value …]

Trains every method on the mixture of configs/mixture.py, with equally many updates of the student from one start, and
writes DIR/comparison/: samples over the true density, and a table of distances to the exact teacher. lambda is the
weight of DMD over that of the consistency loss, in units of sqrt(2e6/D), with which its gradient grows. Started again
on the same DIR it goes on where it was stopped.
"""

import common  # noqa: I001  (puts the checkout on the path)
import math
import functools
import time

import jax
from absl import flags

from configs import methods
from rcm_jax.data import MixtureConfig
from rcm_jax.evaluate import mixture_report
from rcm_jax.evaluate.mixture import evaluate
from rcm_jax.evaluate.report import in_steps
from rcm_jax.run import pipeline
from rcm_jax.run.experiment import Experiment
from rcm_jax.train import checkpoint, trainer
from rcm_jax.train.steps import student_updates
from rcm_jax.util.config import revise
from rcm_jax.util.files import as_path

CONFIG = common.config_flag("A config of rCM on a mixture.", default=str(common.CONFIGS / "mixture.py"))
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs and the comparison go.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of every method for each.")

LAMBDAS = (0.001, 0.01, 0.1, 1.0)
# name of the folder -> name in the comparison, method or recipe of configs/methods.py, lambda (None: the config's)
RUNS = {"scm": ("sCM, λ = 0", "scm", None), "rf_scm": ("RF sCM", "rf_scm", None), "dcm": ("dCM", "dcm", None)}
RUNS |= {"dmd": ("DMD", "dmd", None), "staged": ("dCM, sCM, rCM", "staged", None)}
RUNS |= {f"rcm_{value:g}": (f"rCM, λ = {value:g}", "rcm", value) for value in LAMBDAS}
POINTS = 8  # of the curves
CHOSEN = flags.DEFINE_list("runs", [*RUNS], f"Which of {', '.join(RUNS)}.")
flags.mark_flags_as_required(["workdir"])


def variants(run: Experiment, method: str, weight: float | None, seed: int, teacher: str) -> dict[str, Experiment]:
    """{subfolder: a run}, one after another; they have the network in `teacher`, or ("") the first pretrains one."""
    run = revise(run, {"seed": seed, "teacher": teacher})
    if weight is not None:
        features = 2
        run = revise(run, {"rcm.dmd.scale": weight * math.sqrt(2e6 / features) * run.rcm.consistency.scale})
    runs = methods.stages(run, method) if method in methods.RECIPES else {"": methods.METHODS[method](run)}
    every = {name: max(1, one.train.steps // POINTS) for name, one in runs.items()}
    return {
        name: revise(one, {"train.keep": POINTS, "train.checkpoint_every": every[name]}) for name, one in runs.items()
    }


def run_seed(run: Experiment, folder, seed: int, chosen):
    """Yields (name, judge, trained, updates of the student before) of every run."""
    teacher, judge = "", None
    for place in chosen:
        name, method, weight = RUNS[place]
        start, before, after = "", 0, 0
        for part, one in variants(run, method, weight, seed, teacher).items():
            trained = pipeline.train(revise(one, {"start": start, "teacher": teacher}), folder / place / part)
            start, before, after = str(trained.folder), after, after + student_updates(one.rcm, one.train.steps)
            teacher = teacher or str(trained.teacher_folder)
        judge = judge or mixture_report.make_judge(trained.run, trained.program.network)
        yield name, judge, trained, before


def curve(judge, trained, before: int) -> list[tuple[int, float]]:
    """(updates of the student, map error of one step) at every checkpoint that is kept."""
    abstract = checkpoint.abstract_like(trained.state.ema, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with checkpoint.open_manager(trained.folder) as manager:
        steps = sorted(manager.all_steps())
    students = [checkpoint.restore_item(trained.folder, "ema", abstract, step) for step in steps]
    whole = functools.partial(trained.program.whole, trained.teacher)
    errors = [evaluate(judge.samples(whole(ema))[1], judge.reference)["map_error"] for ema in students]
    updates = [before + student_updates(trained.run.rcm, step) for step in steps]
    return list(zip(updates, errors, strict=True))


def main():
    """Trains every method on every seed, and compares them."""
    started = time.time()
    run = common.experiment(CONFIG)
    if not isinstance(run.data, MixtureConfig) or run.rcm.consistency is None or run.rcm.dmd is None:
        raise ValueError("--config must be of rCM on a mixture: the other methods are made from it, so name none")
    if unknown := [place for place in CHOSEN.value if place not in RUNS]:
        raise ValueError(f"--runs={unknown[0]} is none of {', '.join(RUNS)}")
    folder = as_path(WORKDIR.value)
    results, pictures, curves = {mixture_report.FLOOR: []}, {}, {}
    try:
        for seed in map(int, SEEDS.value):
            for name, judge, trained, before in run_seed(run, folder / f"seed{seed}", seed, CHOSEN.value):
                samples = judge.samples(trained.student)
                for steps, points in samples.items():
                    row = results.setdefault(f"{name}, {in_steps(steps)}", [])
                    row.append(evaluate(points, judge.reference))
                if name not in pictures:
                    pictures[name] = [mixture_report.picture(judge.reference, x) for x in samples.values()]
                    curves[name] = curve(judge, trained, before)
            results[mixture_report.FLOOR].append(mixture_report.floor(judge.reference))
    except trainer.Interrupted as stop:
        print(stop)
        raise SystemExit(130) from None
    plots = {"map error of one step": {}, "map error of one step, rCM": {}}
    for name, points in curves.items():
        title = "map error of one step, rCM" if name.startswith("rCM") else "map error of one step"
        plots[title][name] = points
    print(mixture_report.write_comparison(folder / "comparison", results, pictures, plots))
    print(f"{folder / 'comparison'}: index.html, report.png, report.json ({(time.time() - started) / 60:.1f} min)")


if __name__ == "__main__":
    common.run(main)
