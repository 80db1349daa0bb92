"""Attention kernels: the library's rcm_jax.kernels, which a checkout can also run as `python -m kernels.bench`.

Hugging Face's package is called `kernels`: where it can be imported too, the name is theirs, with our modules added.
"""

import importlib.util
import pathlib
import sys
from importlib.machinery import PathFinder

if __name__ == "kernels":
    elsewhere = [x for x in sys.path if not pathlib.Path(x, "kernels", "blockwise.py").exists()]  # in no checkout
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec and spec.loader:  # a mere folder has none
        theirs = sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        theirs.__path__ += __path__
        spec.loader.exec_module(theirs)
