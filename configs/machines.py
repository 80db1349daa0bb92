"""Machines by name, for the training configs that have a line below: --config=wan_1_3b.py:8gpu, or :8gpu,scm.

| name | chips |
|---|---|
| 8gpu | 8 GPUs of 80 GB on one host, such as H100 or A100 |
| v6e-8 | a slice of 8 chips of TPU v6e |

A machine says how the batch is cut and what is kept for the backward pass. The method and the global batch stay as they
are; `:tiny` has a cut of its own. Parameters, optimizer and EMA are split over all chips. What each line needs, and
how long it takes at least: docs/plan.md.
"""

import functools
from typing import NamedTuple

from rcm_jax.parallel.sharding import MeshConfig
from rcm_jax.run.experiment import Experiment
from rcm_jax.util.config import revise


class Fit(NamedTuple):
    """How a network fits a machine: parts of its batch, one after another, remat, chips that share a sample, and
    whether second moments lie in the memory of the hosts."""

    accumulate: int
    remat: str = "full"
    seq: int = 1
    offload: bool = False


class Machine(NamedTuple):
    """By config how it fits; or, where it does not, why, and what it would take."""

    topology: str  # for scripts/plan.py
    fits: dict[str, Fit | str]


MACHINES = {
    "8gpu": Machine(
        "h100:1x8",
        {
            "wan_1_3b": Fit(16, "save_attention"),
            "wan_14b": Fit(32, seq=4),
            "cosmos_0_6b": Fit(4),
            "cosmos_2b": Fit(4),
        },
    ),
    "v6e-8": Machine(
        "v6e:2x4",
        {
            "wan_1_3b": Fit(32),
            "wan_14b": "state and teacher hold 36.7 GiB of each chip's 31.25; 8 GPUs of 80 GB hold it",
        },
    ),
}


def of(config: str) -> dict:
    """{machine: Experiment -> Experiment} of a config by the name of its file."""
    known = {name: machine.fits[config] for name, machine in MACHINES.items() if config in machine.fits}
    return {name: functools.partial(_apply, config, name, fit) for name, fit in known.items()}


def _apply(config: str, name: str, fit: Fit | str, run: Experiment) -> Experiment:
    if isinstance(fit, str):
        raise ValueError(f"{config} does not fit {name}: {fit} (docs/plan.md)")
    changes = {"train.accumulate": fit.accumulate, "train.offload": fit.offload, "model.remat": fit.remat}
    return revise(run, changes | {"mesh": MeshConfig(data=1, fsdp=-1, seq=fit.seq)})
