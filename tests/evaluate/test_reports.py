"""Reports by how data are shown, of data that nobody has seen before."""

import dataclasses
import json
import subprocess
import sys
import types

import imageio.v3 as imageio
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data import DigitsConfig, MixtureConfig, load
from rcm_jax.data.dataset import Dataset
from rcm_jax.evaluate import classifier, distillation, mixture_report
from rcm_jax.evaluate.mixture import Reference
from rcm_jax.evaluate.reports import REPORTS, no_report
from rcm_jax.media.picture import save_png
from rcm_jax.method import trigflow
from rcm_jax.method.trigflow import WHOLE
from rcm_jax.run.experiment import SamplingConfig
from rcm_jax.run.program import Network, Program
from tests import tiny
from tests.page import content_of
from tests.scripts.conftest import ROOT

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)


@dataclasses.dataclass(frozen=True)
class MoonsConfig:
    """Stands for any config of data."""


def record(**values):
    """A dataclass of these fields."""
    return dataclasses.make_dataclass("Record", [(name, object) for name in values])(**values)


def finished(tmp_path, dataset, centres, teacher=True):
    """What a pipeline.Trained has of a run, whose networks answer with the centre of the class and a little noise."""

    def F(params, x, t, cond):
        x0 = 0.1 * x + params["centres"][cond["label"]]
        return (trigflow.expand(jnp.cos(t), x) * x - x0) / trigflow.expand(jnp.sin(t), x)

    params = {"centres": jnp.concatenate([jnp.asarray(centres), 0 * centres[:1]])}
    rows = [{"step": k, "mine/loss": 1 / k} for k in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_png(tmp_path / "samples/00000002.png", np.zeros((4, 4, 1), np.uint8))
    run = record(
        seed=0,
        data=MoonsConfig(),
        rcm=record(name="mine"),
        teacher_guidance=1.0,
        noise_range=WHOLE,
        sampling=SamplingConfig(sigma_max=80.0, mid_times=((), (1.0,))),
        exact_teacher=False,
    )
    return types.SimpleNamespace(
        run=run,
        dataset=dataset,
        program=Program(run, None, dataset, Network(None, F), F, None, None),
        teacher=types.SimpleNamespace(params=params, uncond=dataset.uncond),
        teacher_folder=tmp_path / "teacher" if teacher else None,
        folder=tmp_path,
        state=types.SimpleNamespace(ema=params),
        student=params,
    )


def examples(centres, n, seed, noise):
    """n noisy copies of each centre [classes, ...]."""
    label = np.tile(np.arange(len(centres), dtype=np.int32), n)
    x0 = centres[label] + noise * np.random.default_rng(seed).normal(size=(len(label), *centres.shape[1:]))
    return {"x0": x0.astype(np.float32), "cond": {"label": label}}


def make_dataset(centres, noise, **options):
    return Dataset(
        train=examples(centres, 30, 0, noise),
        test=examples(centres, 12, 1, noise),
        uncond={"label": np.int32(len(centres))},
        num_classes=len(centres),
        **options,
    )


def read(tmp_path):
    page = content_of(tmp_path / "report/index.html")
    assert ["sampling.sigma_max", "80.0"] in page["config"] and ["rcm.name", "mine"] in page["config"]
    assert [preview["step"] for preview in page["previews"]] == [2]
    assert imageio.imread(tmp_path / "report/report.png").std() > 5
    return json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))


def test_points_of_any_data_are_compared_with_held_out_ones(tmp_path):
    centres = np.array([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.0], [3.0, 3.0]], np.float32)
    dataset = make_dataset(centres, 0.1, view="scatter")
    assert no_report(dataset) == ""
    table = REPORTS["scatter"](finished(tmp_path, dataset, centres))
    record = read(tmp_path)
    assert record["title"] == "mine on moons" and next(iter(record["panels"])) == "training data"
    rows = record["rows"]
    assert list(rows) == ["training data", "student, 1 step", "student, 2 steps"] and "training data" in table
    assert all(set(row) == {"mmd", "sliced_wasserstein"} for row in rows.values())
    assert rows["training data"]["sliced_wasserstein"] < 0.1
    assert max(rows["student, 1 step"]["sliced_wasserstein"], rows["student, 2 steps"]["sliced_wasserstein"]) < 0.25
    assert record["curves"] == {"student losses": {"mine": [[1, 1], [2, 0.5]]}}
    far = finished(tmp_path, dataset, centres[::-1])
    REPORTS["scatter"](far)
    assert read(tmp_path)["rows"]["student, 1 step"]["sliced_wasserstein"] > 1


def test_a_picture_of_data_shows_all_of_them():
    points = np.array([[5.0, 0.0], [0.0, -5.0], [0.0, 0.0]])
    reference = Reference(None, np.arange(3), points, points)
    image = mixture_report.picture(reference, points)
    assert (image != 1).any(axis=-1).sum() == 3


@pytest.mark.parametrize("shape, classes, teacher", [((6, 10, 3), 12, True), ((8, 8, 1), 2, False)])
def test_any_labelled_images_have_a_report(tmp_path, monkeypatch, shape, classes, teacher):
    monkeypatch.setattr(distillation, "SAMPLES", 24)
    monkeypatch.setitem(classifier.train_classifier.__kwdefaults__, "steps", 20)
    centres = np.random.default_rng(0).normal(size=(classes, *shape)).astype(np.float32)
    dataset = make_dataset(centres, 0.3, to_image=lambda x0: np.clip(np.asarray(x0) / 8 + 0.7, 0, 1), view="grid")
    assert no_report(dataset) == ""
    table = REPORTS["grid"](finished(tmp_path, dataset, centres, teacher))
    record = read(tmp_path)
    assert record["title"] == "mine on moons" and "digits" not in table + json.dumps(record)
    teachers = ["teacher 50", "teacher 4"] if teacher else []
    assert list(record["rows"]) == [distillation.REAL, *teachers, "student 1", "student 2"]
    pictured = ["teacher, 50 steps"] if teacher else []
    assert list(record["panels"]) == ["real moons", *pictured, "student, 1 step", "student, 2 steps"]
    assert record["panels"]["real moons"] == [8 * min(classes, 10), *shape]
    samples = classes * max(8, 24 // classes)
    assert record["metadata"]["samples"] == samples
    assert f"ratios to {'teacher 50' if teacher else distillation.REAL}" in record["footer"]
    assert f"is {samples} of the {30 * classes} images that trained" in record["footer"]


def test_classes_with_few_images_leave_places_grey():
    images, labels = np.ones((5, 2, 2, 1)), np.array([0, 0, 0, 2, 2])
    rows = distillation._by_class(images, labels, 3).reshape(3, 8, -1)
    assert np.isfinite(rows).all(axis=2).sum(axis=1).tolist() == [3, 0, 2]


def test_data_without_a_report_have_a_reason(monkeypatch):
    for config in (DigitsConfig(), MixtureConfig((1.0,), ((0.0, 0.0),), (1.0,), (0,), examples=8)):
        dataset = load(config)
        assert dataset.view in REPORTS and no_report(dataset) == ""
    for changes, words in [
        (dict(test=None), "held-out data"),
        (dict(num_classes=None), "classes"),
        (dict(num_classes=1000), "evaluate.py"),
    ]:
        reason = no_report(dataclasses.replace(dataset, **changes))
        assert reason.startswith("no report: ") and words in reason
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert no_report(dataset) == "no report: matplotlib is not installed: pip install 'rcm-jax[demo]'"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"sklearn is not installed: pip install 'rcm-jax\[demo\]'"):
        load(DigitsConfig())


def test_nothing_but_drawing_and_the_digits_imports_the_extras():
    program = (
        "import sys, rcm_jax.run.pipeline, rcm_jax.run.generate, rcm_jax.plan.sweep, rcm_jax.evaluate.reports, "
        "rcm_jax.evaluate.precision; "
        "assert not {'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
