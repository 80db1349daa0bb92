"""Training on a set of several shapes: a program for each, and a run that goes on as if it had not stopped."""

import contextlib

import numpy as np
import pytest

from rcm_jax.data import SyntheticConfig
from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run import pipeline
from rcm_jax.train import pace, trainer
from rcm_jax.train.metrics import read_metrics
from rcm_jax.util.config import revise
from tests import latents, tiny
from tests.build import killed

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)
given = pytest.fixture(scope="module", autouse=True)(latents.given)
OTHER = (3, 2, 6, 4)


@pytest.fixture(scope="module")
def two_shapes(given):
    """A set of 12 examples of the config's shape and 8 of another, with more frames than the config takes."""
    shapes = [OTHER if i % 5 < 2 else latents.SHAPE for i in range(20)]
    items = [item._replace(shape=shape) for item, shape in zip(killed.items(20), shapes, strict=True)]

    def make(some, prepared, texts):
        rngs = [np.random.default_rng(item.origin["seed"]) for item in some]
        return [{"x0": rng.normal(size=item.shape).astype(np.float32), "text": np.ones(latents.TEXT, np.float32)}
                for rng, item in zip(rngs, some, strict=True)]  # fmt: skip

    source = killed.source(make=make, items=items, brings_text=True)
    assert killed.build(given / "two_shapes", source, shard=4, uncond=np.zeros(latents.TEXT, np.float32)) == 20
    return given / "two_shapes"


def test_a_run_on_two_shapes_has_a_program_for_each_and_goes_on_exactly(given, two_shapes, tmp_path, monkeypatch):
    run = latents.experiment(given, vae=False, mesh=MeshConfig(1, 4, 2), **{"data.path": str(two_shapes)})
    run = revise(run, {"train.steps": 12, "train.batch_size": 4, "train.log_every": 1})
    seen = []

    def spy(self, name, step, *args, through=pace.Pace.run):
        seen.append((step, args[-1]["x0"].shape[1:], len(self.compiled)))
        return through(self, name, step, *args)

    monkeypatch.setattr(pace.Pace, "run", spy)
    whole = pipeline.train(run, tmp_path / "whole")
    shapes = [shape for _, shape, _ in seen]
    assert whole.program.sample_shape == latents.SHAPE
    assert set(shapes) == {latents.SHAPE, (2, *OTHER[1:])} and seen[-1][2] == 2

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_stop_requested", lambda: contextlib.nullcontext(lambda step: step == 5))
        with pytest.raises(trainer.Interrupted):
            pipeline.train(run, tmp_path / "parts")
    pipeline.train(revise(run, {"mesh": MeshConfig(1, 2, 4)}), tmp_path / "parts")
    assert [shape for _, shape, _ in seen[12:]] == shapes
    learned = (
        [row for row in read_metrics(tmp_path / name) if "preview/std" not in row] for name in ("parts", "whole")
    )
    for row, other in zip(*learned, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)  # summed over two parts at last, not four


def test_a_config_runs_on_noise_with_a_teacher_of_random_parameters(given, tmp_path):
    run = latents.experiment(given, vae=False, data=SyntheticConfig(latents.SHAPE), teacher="random")
    trained = pipeline.train(run, tmp_path / "run")
    assert trained.teacher_folder is None and read_metrics(tmp_path / "run")
    first = latents.experiment(given, vae=False, data=SyntheticConfig(latents.SHAPE), teacher="random", seed=1)
    other = pipeline.train(first, tmp_path / "other")
    assert tiny.relative(*(t.teacher.params["out"]["kernel"] for t in (trained, other))) > 0.1
