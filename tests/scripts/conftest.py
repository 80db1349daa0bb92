"""Scripts run as a user runs them: in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# A whole run in seconds. What is evaluated at its end is made small by SHRINK.
TINY = [
    "--config=configs/digits.py",
    "--config.pretrain.train.steps=4",
    "--config.pretrain.train.batch_size=8",
    "--config.train.steps=6",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.train.sample_every=3",
    "--config.rcm.warmup=2",
    "--config.rcm.dmd.update_freq=2",
    "--config.model.dim=16",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.patch=4",
]
# The evaluation's own constants, for a few hundred samples and a hardly trained judge.
SHRINK = """
import runpy, sys
sys.path.insert(0, "scripts")
from rcm_jax.evaluate import classifier, distillation
assert distillation.SAMPLES and distillation.BATCH and classifier.train_classifier.__kwdefaults__["steps"]
distillation.SAMPLES = distillation.BATCH = 200
classifier.train_classifier.__kwdefaults__["steps"] = 20
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def start_script(tmp_path_factory):
    """start_script(name, *arguments, devices=1, small=False) -> a running process whose output is piped."""
    cache = tmp_path_factory.mktemp("xla")

    def start(name, *arguments, devices=1, small=False):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(ROOT),
        }
        program = ["-c", SHRINK, f"scripts/{name}.py"] if small else [f"scripts/{name}.py"]
        command = [sys.executable, *program, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


def finish(process, seconds=300) -> subprocess.CompletedProcess:
    """What a running process has printed when it ends; it is killed if it does not."""
    try:
        output = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


@pytest.fixture(scope="session")
def run_script(start_script):
    """run_script(name, *arguments, devices=1, small=False) -> the finished process, output captured."""
    return lambda *arguments, **options: finish(start_script(*arguments, **options))


@pytest.fixture(scope="session")
def trained(run_script, tmp_path_factory):
    """(workdir, process) of a finished tiny distillation with its teacher. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    process = run_script("train", f"--workdir={workdir}", *TINY, small=True)
    assert process.returncode == 0, process.stderr
    return workdir, process


def snapshot(folder) -> dict[str, bytes]:
    """Every file of a folder with its contents; nothing if there is no such folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(process, *words) -> None:
    """A failure in one clear line on stderr that holds these words, and nothing on stdout."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    assert process.stdout == ""


def write_config(folder, values) -> None:
    """A workdir with a config and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
