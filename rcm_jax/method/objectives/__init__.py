"""Objectives: one file each, with its settings, its equation and its draws. Equation numbers as in docs/methods.md.

A new one is a file, and a line in one of these tables under the name that configs and metrics call it by.
"""

from rcm_jax.method.objectives.common import Given as Given
from rcm_jax.method.objectives.common import Matching, Objective
from rcm_jax.method.objectives.common import Term as Term
from rcm_jax.method.objectives.dcm import DcmConfig
from rcm_jax.method.objectives.diffusion import DiffusionConfig as DiffusionConfig
from rcm_jax.method.objectives.dmd import DmdConfig
from rcm_jax.method.objectives.rf_scm import RfScmConfig
from rcm_jax.method.objectives.scm import ScmConfig

# Losses on the data, from the start.
CONSISTENCY: dict[str, type[Objective]] = {"scm": ScmConfig, "rf_scm": RfScmConfig, "dcm": DcmConfig}
MATCHING: dict[str, type[Matching]] = {"dmd": DmdConfig}  # losses on the student's samples, with a critic
