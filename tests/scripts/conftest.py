"""Scripts run as a user runs them: in a process of their own, most of them forked from one that has imported it all."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from rcm_jax.run import workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# A whole run in seconds. What is evaluated at its end is made small by SHRINK.
TINY = [
    "--config=digits.py",
    "--config.pretrain.train.steps=4",
    "--config.pretrain.train.batch_size=8",
    "--config.pretrain.train.checkpoint_every=2",
    "--config.pretrain.train.snapshot_every=2",
    "--config.train.steps=6",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.train.snapshot_every=2",
    "--config.rcm.ema_tracks=(0.1,)",
    "--config.train.sample_every=3",
    "--config.rcm.warmup=2",
    "--config.rcm.dmd.update_freq=2",
    "--config.model.dim=16",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.patch=4",
]
# A script with its arguments; a "small" one evaluates a few hundred samples with a hardly trained judge.
RUN = """
import atexit, json, os, runpy, signal, sys, traceback
sys.path.insert(0, "scripts")

def run(small, *argv):
    if small == "small":
        from rcm_jax.evaluate import classifier, distillation, mixture_report
        from rcm_jax.run import previews
        assert distillation.SAMPLES and previews.BATCH and classifier.train_classifier.__kwdefaults__["steps"]
        assert mixture_report.SAMPLES
        distillation.SAMPLES = mixture_report.SAMPLES = previews.BATCH = 200
        classifier.train_classifier.__kwdefaults__["steps"] = 20
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")
"""
# Imports are most of what a short run takes: they are done once, and every line read forks a process that runs it.
SERVE = """
import common, rcm_jax.convert, rcm_jax.run.generate, rcm_jax.run.pipeline, rcm_jax.evaluate.mixture_report
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.environ["XLA_FLAGS"] = job["xla"]
    for file, path in (1, job["stdout"]), (2, job["stderr"]):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(300)
    code = 1
    try:
        run(*job["argv"])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the second that it takes to free all modules
"""


def devices_flag(devices: int) -> str:
    return f"--xla_force_host_platform_device_count={devices}"


def command(name, arguments, small) -> list[str]:
    return ["small" if small else "", f"scripts/{name}.py", *map(str, arguments)]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of every script: no optimisations, and what one has compiled is there for the next."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def start_script(environment):
    """start_script(name, *arguments, devices=1, small=False) -> a running process whose output is piped."""

    def start(name, *arguments, devices=1, small=False):
        program = [sys.executable, "-c", RUN + "run(*sys.argv[1:])", *command(name, arguments, small)]
        pipe, env = subprocess.PIPE, environment | {"XLA_FLAGS": devices_flag(devices)}
        return subprocess.Popen(program, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)

    return start


def finish(process, seconds=300) -> subprocess.CompletedProcess:
    """What a running process has printed when it ends; it is killed if it does not."""
    try:
        output = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


@pytest.fixture(scope="session")
def run_script(environment, tmp_path_factory):
    """run_script(name, *arguments, devices=1, small=False) -> the finished process, output captured."""
    folder, pipe = tmp_path_factory.mktemp("output"), subprocess.PIPE
    files = {name: folder / name for name in ("stdout", "stderr")}
    options = dict(cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", RUN + SERVE], **options) as server:

        def run(name, *arguments, devices=1, small=False):
            argv = command(name, arguments, small)
            job = dict(argv=argv, xla=devices_flag(devices)) | {name: str(path) for name, path in files.items()}
            print(json.dumps(job), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(argv, code, *(path.read_text() for path in files.values()))

        yield run
        server.stdin.close()


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


def write_config(folder, config) -> None:
    """A workdir with a config and nothing else."""
    workdir.claim(folder, config)
