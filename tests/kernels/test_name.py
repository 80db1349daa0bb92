"""`kernels` is also the name of a package of Hugging Face's: wherever both can be imported, both work."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
USE_OURS = """
import jax.numpy as jnp
from rcm_jax.kernels import attention
x = jnp.ones((1, 3, 1, 2))
assert (attention.flash_attention(x, x, x) == x).all()
print(attention.__file__)
"""
USE_THEIRS = "from kernels import get_kernel; import kernels.layer; print(get_kernel(), kernels.layer.__file__);"
WHERE = "import kernels.workloads; print(kernels.__file__, kernels.workloads.__file__)"


def python(*arguments, path=(), cwd):
    """What a new Python prints that looks for modules in these folders before its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()


@pytest.fixture
def theirs(tmp_path):
    """A folder with a package `kernels` that imports itself by its name, as Hugging Face's does."""
    package = tmp_path / "theirs" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from kernels.layer import NAME\n\ndef get_kernel():\n    return NAME\n")
    (package / "layer.py").write_text("NAME = 'theirs'\n")
    return package.parent


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_on_the_path(theirs, tmp_path, first):
    path = (ROOT, theirs) if first == "ours" else (theirs, ROOT)
    printed = python("-c", USE_THEIRS + USE_OURS, path=path, cwd=tmp_path)
    assert printed == ["theirs", str(theirs / "kernels/layer.py"), str(ROOT / "kernels/attention.py")]


def test_in_a_checkout(theirs):
    printed = python("-c", USE_THEIRS + WHERE, path=[theirs], cwd=ROOT)
    expected = (theirs / "kernels/layer.py", theirs / "kernels/__init__.py", ROOT / "kernels/workloads.py")
    assert printed == ["theirs", *map(str, expected)]
    assert "kernels.bench" in python("-m", "kernels.bench", "--help", path=[theirs], cwd=ROOT)


@pytest.mark.parametrize("files", [(), ("__init__.py", "blockwise.py")], ids=["a folder", "another checkout"])
def test_what_is_not_theirs(tmp_path, files):
    (tmp_path / "kernels").mkdir()
    for name in files:
        (tmp_path / "kernels" / name).touch()
    printed = python("-c", WHERE, path=[tmp_path], cwd=ROOT)
    assert printed == [str(ROOT / "kernels" / name) for name in ("__init__.py", "workloads.py")]


def test_a_wheel(tmp_path):
    pytest.importorskip("hatchling")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    every = zipfile.ZipFile(wheel).namelist()
    assert "rcm_jax/evaluate/page.html" in every
    names = [name for name in every if "kernels/" in name]
    assert sorted(names) == sorted(f"rcm_jax/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py"))
    assert python("-c", USE_OURS, path=[wheel], cwd=tmp_path) == [str(wheel / "rcm_jax/kernels/attention.py")]
