"""Metrics on disk."""

import json
import math

import jax.numpy as jnp
import pytest

from rcm_jax.train.metrics import MetricsWriter, Window, read_metrics, read_pace


def test_rows_are_json_lines_and_numbers_that_are_not_finite_are_null(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"a": 0.5, "b": math.nan}, {"pace/goodput": 0.9})
    writer.write(2, {"a": math.inf}, {"pace/goodput": 0.8})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == read_metrics(tmp_path)
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5, "b": None}, {"step": 2, "a": None}]
    assert [row["pace/goodput"] for row in read_pace(tmp_path)] == [0.9, 0.8]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.smoke
def test_a_writer_opened_at_a_step_forgets_what_came_after_and_a_line_cut_off(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (5, 10, 15):
        writer.write(step, {"a": float(step)}, {"b": 2.0 * step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "a"')
    writer = MetricsWriter(tmp_path, 10)
    writer.write(15, {"a": 1.0}, {"b": 2.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 5, "a": 5.0}, {"step": 10, "a": 10.0}, {"step": 15, "a": 1.0}]
    assert [row["b"] for row in read_pace(tmp_path)] == [10.0, 20.0, 2.0]
    assert not list(tmp_path.glob("*.partial"))


def test_metrics_of_a_folder_without_any_are_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_means_are_over_the_steps_that_have_the_name_and_are_forgotten_when_read():
    window = Window()
    window.add({"scm/loss": jnp.float32(1.0)})
    window.add({"scm/loss": jnp.float32(2.0)})
    window.add({"critic/loss": jnp.float32(5.0)})
    window.add({"watched": {"examples": jnp.zeros(3)}})
    assert window.read() == {"critic/loss": 5.0, "scm/loss": 1.5}
    assert window.read() == {}


def test_wandb_without_the_library_says_how_to_get_it(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"config\.train\.wandb: .*pip install .*\[wandb\]"):
            MetricsWriter(tmp_path, 0, wandb=True)
    else:
        pytest.skip("wandb is installed")


@pytest.mark.parametrize("line", [b"{", b"[" * 10**5, b"3", b'{"loss": 1}', b'{"step": "7"}', b"\xff\xfe", b"null"])
def test_a_line_that_cannot_be_read_is_named_and_kept_aside(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    with caplog.at_level("WARNING", logger="absl"):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert f"{path}, line 2 cannot be read" in caplog.text
    MetricsWriter(tmp_path, 2).close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == line + b"\n"
