"""Deliberate faults, one at a time, and whether the tests around them see it: make mutants [ONLY=word].

The faults are in tests/mutants.toml. Each is put into a copy of the checkout, and its tests are run there until the
first fails. Hours long: not part of the suite. Exit status 1 if a fault survives that is not known to change nothing.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("rcm_jax", "kernels", "configs", "scripts", "tests", "pyproject.toml")


def read() -> list[dict]:
    """The faults, each with the tests of its group; ValueError for one that does not fit the code any more."""
    groups = tomllib.loads((ROOT / "tests/mutants.toml").read_text())["group"]
    faults = [{"tests": group["tests"], "file": group["file"]} | fault for group in groups for fault in group["fault"]]
    for fault in faults:
        count = (ROOT / fault["file"]).read_text().count(fault["old"])
        if count != 1:
            raise ValueError(f"{fault['file']} has {count} times, not once: {fault['old']}")
        if missing := [path for path in fault["tests"] if not (ROOT / path).exists()]:
            raise ValueError(f"{fault['file']}: there is no {missing[0]}")
    return faults


def survives(fault: dict, copy: pathlib.Path) -> bool:
    """Whether all its tests pass with it."""
    path = copy / fault["file"]
    whole = path.read_text()
    path.write_text(whole.replace(fault["old"], fault["new"]))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *fault["tests"]]
    try:
        ended = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    finally:
        path.write_text(whole)
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"the tests did not run: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended.returncode == 0


def main(only: str = "") -> int:
    """Prints a line for each fault; returns how many survive that should not."""
    chosen, surprises = [fault for fault in read() if only in f"{fault['file']}: {fault['what']}"], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            source = ROOT / name
            shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
        for fault in chosen:
            alive, why = survives(fault, copy), fault.get("equivalent", "")
            surprises += alive and not why
            words = f"survives: {why}" if alive and why else "SURVIVES" if alive else "caught"
            print(f"{fault['file']}: {fault['what']}: {words}", flush=True)
    print(f"{len(chosen)} faults, {surprises} that survive and should not")
    return surprises


if __name__ == "__main__":
    raise SystemExit(min(main(*sys.argv[1:]), 1))
