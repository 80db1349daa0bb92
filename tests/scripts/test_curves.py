"""The command that draws what is watched."""

import imageio.v3 as iio

from tests.scripts.conftest import assert_refused


def test_runs_are_drawn_one_below_the_other(run_script, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "dmd/weight": 1.0}\n{"step": 2, "dmd/weight": 2.0}\n')
    shapes = []
    for runs in (["one"], ["one", "two"]):
        out = tmp_path / "new" / "curves.png"
        again = ["--overwrite"] if shapes else []
        process = run_script("curves", *(f"--run={name}={tmp_path}" for name in runs), f"--out={out}", *again)
        assert process.returncode == 0, process.stderr
        assert iio.imread(out).std() > 1
        shapes.append(iio.imread(out).shape)
    assert shapes[1] == (2 * shapes[0][0], *shapes[0][1:])


def test_a_folder_without_metrics_is_refused(run_script, tmp_path):
    for run in (f"a={tmp_path}", str(tmp_path)):
        process = run_script("curves", f"--run={run}", f"--out={tmp_path / 'curves.png'}")
        assert_refused(process, f"no metrics.jsonl in {tmp_path}", "--run=NAME=WORKDIR")
    assert_refused(run_script("curves", f"--run=a={tmp_path}"), "--out must have a value")
    assert not list(tmp_path.iterdir())
