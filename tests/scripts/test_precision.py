"""The command of the study of narrow precision."""

import json
import os
import subprocess
import sys

import imageio.v3 as iio
import jax
import numpy as np
import pytest

from rcm_jax.evaluate.precision import QUANTITIES, VARIANTS, summary
from tests.scripts.conftest import ROOT, assert_refused

SHRINK = """
import sys
sys.path[:0] = ["scripts", "."]
import precision
from tests import wan
assert "wan-1.3b" in precision.PUBLISHED
precision.PUBLISHED["wan-1.3b"] = wan.TINY
precision.common.run(precision.main)
"""
FLAGS = ["--times=2", "--repeats=1", "--grid=2,4,4", "--tokens=4"]


def test_picture_table_and_record(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    png, record = tmp_path / "new" / "p.png", tmp_path / "p.json"
    process = subprocess.run(
        [sys.executable, "-c", SHRINK, f"--out={png}", f"--json={record}", *FLAGS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert f"JAX {jax.__version__}" in process.stdout and "2 layers" in process.stdout
    assert "peak memory" in process.stdout
    values = json.loads(record.read_text(encoding="utf-8"))
    assert (values["times"], values["grid"], values["model"]["dim"]) == (2, [2, 4, 4], 24)
    assert list(values["errors"]) == list(VARIANTS) and list(values["rms"]) == list(QUANTITIES)
    errors = {name: {k: np.array(v) for k, v in row.items()} for name, row in values["errors"].items()}
    for name, row in summary({"errors": errors}).items():
        assert name in process.stdout and f"{row['dF']:.3f}" in process.stdout
    picture = iio.imread(png)
    assert picture.shape[1] == 1640 and picture[..., :3].std() > 20
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["p.json", "p.png"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--out=p.pdf", "--out p.pdf must end in .png"),
        ("--layers=0", "num_layers is 0: it must be"),
        ("--layers=two", "flag --layers=two"),
        ("--model=wan-i2v-14b", "flag --model=wan-i2v-14b: value should be one of <wan-1.3b|"),
        ("--grid=8,8", "--grid=8,8 must be frames, rows and columns, e.g. 2,8,8"),
        ("--grid=2,8,x", "--grid=2,8,x must be frames, rows and columns"),
        ("--repeats=0", "times 16, repeats 0, grid (2, 8, 8) and tokens 16 must be at least 1"),
        ("--smooth=-1", "smooth -1.0 must be at least 0"),
    ],
)
def test_bad_flags_are_refused_in_one_line(run_script, tmp_path, flag, message):
    process = run_script("precision", f"--out={tmp_path / 'p.png'}", flag)
    assert_refused(process, message)
    assert process.returncode == 2 and not list(tmp_path.iterdir())
