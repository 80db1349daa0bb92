"""Curves of what is watched, from metrics files."""

import json
import sys

import numpy as np
import pytest

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


def test_the_command_draws_a_picture_or_says_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["curves", f"run={tmp_path}", f"--out={out}"])
    curves.main()
    assert out.stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["curves", "run=nowhere", f"--out={out}"])
    with pytest.raises(SystemExit):
        curves.main()
    assert "no metrics.jsonl in nowhere" in capsys.readouterr().err
