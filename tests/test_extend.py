"""One of everything, added from outside the library as docs/extend.md says: a line in one table each, and it trains.

What is added here is known at once to configs, flags, training, previews, reports and sampling.
"""

import itertools
import json

import flax.linen as nn
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rcm_jax
from configs import methods, mixture
from rcm_jax.data import DATASETS, Source
from rcm_jax.data.dataset import Dataset
from rcm_jax.evaluate import mixture as points
from rcm_jax.evaluate import reports
from rcm_jax.method import denoiser, samplers, trigflow
from rcm_jax.method.keys import named_keys
from rcm_jax.method.objectives import CONSISTENCY, Given, Objective, Term
from rcm_jax.method.objectives.common import sum_squares
from rcm_jax.models import NETWORKS
from rcm_jax.models.layers import dense, sinusoids
from rcm_jax.models.records import Network
from rcm_jax.run import pipeline
from rcm_jax.run.experiment import from_mapping
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.config import revise
from rcm_jax.util.ranges import Count, Positive, Width, config
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

# --- an objective: its settings, its equation, its draws


@config
class MatchConfig(Objective):
    """The student's velocity is pulled to the guided teacher's: plain distillation of the guidance."""

    time: trigflow.TimeDistribution = trigflow.one_of_times(trigflow.LogNormal(0.0, 1.6))
    scale: Positive = 1.0

    label = "match"

    def term(self, given: Given) -> Term:
        """‖F − F_T‖² on the batch."""
        keys, x0 = named_keys(given.key, "time", "noise"), given.batch["x0"]
        t = self.time.sample(keys["time"], x0.shape[:1])
        x_t = trigflow.diffuse(x0, jax.random.normal(keys["noise"], x0.shape), t)
        values = sum_squares(given.F.student(given.student, x_t, t, given.batch["cond"]) - given.teacher_F(x_t, t))
        return Term(values, {"loss": values}, t)


# --- a network: its config, its module, its record


@config
class LinearConfig:
    """One layer on points, time and label: hardly a network."""

    num_classes: Width
    features: Width = 2


class Linear(nn.Module):
    config: LinearConfig

    @nn.compact
    def __call__(self, x, t, label):
        c = self.config
        features = [x, sinusoids(t, np.array([1.0, 2.0])), jax.nn.one_hot(label, c.num_classes + 1)]
        return dense(c.features, "out", dtype="float32", axes=("features", "embed"))(jnp.concatenate(features, -1))


LINEAR = Network(
    config=LinearConfig,
    module=Linear,
    conditions=lambda config, shape: {"label": jax.ShapeDtypeStruct((), jnp.int32)},
    smallest=lambda config: (config.features,),
)

# --- a data set: its config, how it is loaded and shown


@config
class RingsConfig:
    """Two rings in the plane, one class each."""

    examples: Count = 512


def load_rings(config: RingsConfig) -> Dataset:
    def examples(seed):
        rng = np.random.default_rng(seed)
        label = (np.arange(config.examples) % 2).astype(np.int32)
        angle = rng.uniform(0, 2 * np.pi, config.examples)
        x0 = np.stack([np.cos(angle), np.sin(angle)], -1) * (0.8 + label)[:, None]
        return {"x0": x0.astype(np.float32), "cond": {"label": label}}

    return Dataset(examples(0), examples(1), {"label": np.int32(2)}, num_classes=2, view="scatter")


# --- a sampler, and a metric


def trapezoid(F: denoiser.Velocity, params, noise, times, cond):
    """Heun's method on the PF-ODE, second order."""
    x = noise
    for t, u in itertools.pairwise(times):
        t_b, u_b = (jnp.full(x.shape[:1], time) for time in (t, u))
        first = F(params, x, t_b, cond)
        ahead = F(params, x + (u - t) * first, u_b, cond)
        x = x + (u - t) * (first + ahead) / 2
    return x


def gap(a, b) -> float:
    """Between the means of points."""
    return float(np.linalg.norm(a.mean(axis=0) - b.mean(axis=0)))


@pytest.fixture
def extended(monkeypatch):
    """Each of them in its table: a line of existing code."""
    monkeypatch.setitem(CONSISTENCY, "match", MatchConfig)
    monkeypatch.setitem(NETWORKS, "linear", LINEAR)
    monkeypatch.setitem(DATASETS, "rings", Source(RingsConfig, load_rings))
    monkeypatch.setitem(samplers.SOLVERS, "trapezoid", trapezoid)
    monkeypatch.setitem(points.DISTANCES, "gap", gap)
    monkeypatch.setitem(
        methods.METHODS, "match", lambda run: revise(methods.scm(run), {"rcm.consistency": MatchConfig()})
    )


def experiment():
    loop = dict(steps=4, batch_size=16, log_every=1, checkpoint_every=2, sample_every=2)
    run = revise(
        mixture.EXPERIMENT,
        {
            "model": LinearConfig(num_classes=2),
            "data": RingsConfig(),
            "exact_teacher": False,
            "sampling.teacher_solver": "trapezoid",
            "sampling.teacher_steps": 3,
            "rcm.warmup": 0,
            "pretrain.train": revise(mixture.EXPERIMENT.pretrain.train, loop),
        },
    )
    run = methods.choose(run, "match", {})
    return revise(run, {"train": revise(run.train, loop)})


@pytest.mark.usefixtures("extended")
def test_one_of_everything_from_outside_trains_is_shown_reported_and_sampled(tmp_path):
    run = experiment()
    assert from_mapping(methods.flagged(run).to_dict()) == run  # through the flags
    trained = pipeline.train(run, tmp_path / "run")
    rows = read_metrics(trained.folder)
    assert len(rows) == 4 and all(np.isfinite(row["match/loss"]) for row in rows)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["rcm"]["consistency"]["kind"], config["data"]["kind"], config["model"]["kind"]) == (
        "match", "rings", "linear",
    )  # fmt: skip
    assert run.rcm.name == "match" and imageio.imread(tmp_path / "run/samples/00000004.png").std() > 1
    assert not reports.no_report(trained.dataset)
    reports.REPORTS[trained.dataset.view](trained)
    record = json.loads((tmp_path / "run/report/report.json").read_text())
    assert all("gap" in row for row in record["rows"].values())
    assert "match" in {label for curves in record["curves"].values() for label in curves}

    samples = rcm_jax.load(tmp_path / "run")([0, 1, 1], seeds=(3, 4), steps=2)
    assert samples.latents.shape == (3, 2, 2) and np.isfinite(samples.latents).all()
    samples.save(tmp_path / "points.png")
    assert imageio.imread(tmp_path / "points.png").std() > 1
    assert rcm_jax.load(tmp_path / "run/teacher")([0]).latents.shape == (1, 1, 2)
