"""Curves of what is watched, from metrics files."""

import json

import numpy as np

from rcm_jax.evaluate import curves

ROWS = [
    {"step": k, "scm/residual/t0": 1 / k, "scm/residual/t2": 2 / k, "critic/grad_norm": None if k == 2 else 3.0}
    for k in (1, 2, 3)
]


def test_a_panel_has_a_line_for_every_metric_that_the_run_has():
    figure = curves.draw({"one": ROWS, "two": ROWS[:1]})
    axes = dict(zip(curves.PANELS, figure.axes, strict=False))
    lines = {title: {line.get_label(): line.get_xydata() for line in axis.lines} for title, axis in axes.items()}
    assert set(lines["residual: rms of c·df/dt, by time"]) == {"t0", "t2"}
    np.testing.assert_allclose(lines["residual: rms of c·df/dt, by time"]["t2"], [[1, 2], [2, 1], [3, 2 / 3]])
    np.testing.assert_allclose(lines["gradient norms"]["fake score"], [[1, 3], [3, 3]])
    assert not lines["DMD: weight w"]
    assert len(figure.axes) == 2 * len(curves.PANELS)


def write(folder, rows):
    """A workdir with these metrics."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_report_has_a_curve_for_every_loss_whoever_made_it(tmp_path):
    others = {"mine/loss/t0": 1.0, "mine/residual/t0": 0.1, "mine/weight": 1.0, "loss": 1.0}
    student = [
        {"step": 1, "mine/loss": 3.0, "scm/tangent_norm": 0.5, "mine/residual": 0.2} | others,
        {"step": 2, "mine/loss": None, "dmd/loss": 7.0, "critic/loss": 5.0, "never/loss": None},
    ]
    teacher = [{"step": 9, "diffusion/loss": 2.0, "scm/tangent_norm": 1.0}]
    student, teacher = write(tmp_path / "student", student), write(tmp_path / "teacher", teacher)
    plots = {
        "teacher loss": {"diffusion": [[9, 2]]},
        "student losses": {"mine": [[1, 3]], "dmd": [[2, 7]]},
        "residuals": {"mine": [[1, 0.2]]},
        "fake score loss": {"critic": [[2, 5]]},
        "norms": {"tangent": [[1, 0.5]]},
    }
    made = curves.of_training(student, teacher)
    assert {title: {k: v.tolist() for k, v in plot.items()} for title, plot in made.items()} == plots
    assert list(made["student losses"]) == ["mine", "dmd"]  # as they come
    assert list(curves.of_training(teacher)) == ["student losses", "norms"]
    assert curves.of_training(tmp_path / "nothing") == {}
    assert "residual" in curves.note(made) and curves.note(curves.of_training(teacher)) == ""
