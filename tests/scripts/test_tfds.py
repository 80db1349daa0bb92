"""Training on a data set of TFDS, from the command line."""

from tests.scripts.conftest import TINY, assert_refused
from tests.tfds_images import prepare


def test_images_of_tfds_are_trained_on_sampled(run_script, tmp_path):
    folder = prepare(tmp_path / "data", {"train": 60})
    flags = ["--config=digits.py:sct", *(flag for flag in TINY[1:] if ".pretrain." not in flag and ".rcm." not in flag)]
    flags += ["--config.rcm.warmup=2", "--config.data.kind=tfds", "--config.data.name=tiny"]
    process = run_script("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused(process, "config.data.path ''")
    flags.append(f"--config.data.path={folder}")
    process = run_script("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert process.returncode == 0, process.stderr
    assert "6 steps of 8 samples [8, 8, 1]; 60 examples" in process.stderr
    assert "no report: it compares samples of classes with held-out data" in process.stdout
    out = tmp_path / "some.png"
    process = run_script("sample", f"--checkpoint={tmp_path / 'run'}", "--steps=2", "--each=3", f"--out={out}")
    assert process.returncode == 0 and out.exists(), process.stderr
