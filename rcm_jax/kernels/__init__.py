"""Attention kernels under a name of their own: "kernels" alone is also a package of Hugging Face's.

In a checkout they are the folder kernels/ at its top, which may import nothing of rcm_jax; a wheel holds them here.
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "kernels")]
