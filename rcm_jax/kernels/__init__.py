"""Attention kernels under a name of their own: "kernels" alone is also a package of Hugging Face's.

In a checkout they are the folder kernels/ at its top, which may import nothing of rcm_jax; a wheel holds them here.
"""

import pathlib

_top = pathlib.Path(__file__).resolve().parents[2] / "kernels"
if _top.is_dir() and not (pathlib.Path(__file__).parent / "attention.py").exists():
    __path__ = [str(_top)]
