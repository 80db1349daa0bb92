"""Machines by name: what they set divides, and they leave the method alone."""

import importlib
import math

import jax
import pytest

from configs import digits, machines, methods, wan_1_3b
from configs.machines import MACHINES, Fit
from rcm_jax.models import check_network
from rcm_jax.parallel.sharding import check_batch, make_mesh
from rcm_jax.plan import topologies
from rcm_jax.plan.program import prepare
from rcm_jax.run.experiment import from_mapping
from rcm_jax.util.config import revise

LINES = [(machine, config) for machine, (_, fits) in MACHINES.items() for config in fits]
FITTING = [(machine, config) for machine, config in LINES if isinstance(MACHINES[machine].fits[config], Fit)]


def run_of(config, variant):
    return from_mapping(importlib.import_module(f"configs.{config}").get_config(variant).to_dict())


@pytest.mark.parametrize("machine, config", FITTING)
def test_every_line_divides_over_its_chips(machine, config):
    run, sizes = run_of(config, machine), MACHINES[machine].topology.partition(":")[2]
    mesh = make_mesh(run.mesh, jax.devices()[: math.prod(map(int, sizes.split("x")))])
    check_batch(run.train.batch_size, mesh, run.train.accumulate)
    check_network(run.model, run.data.shape, mesh)


@pytest.mark.parametrize("machine, config", FITTING)
def test_a_machine_changes_nothing_of_the_method(machine, config):
    run, plain = run_of(config, f"{machine},dmd"), run_of(config, "dmd")
    keys = {"mesh": plain.mesh, "model.remat": plain.model.remat}
    keys |= {f"train.{key}": getattr(plain.train, key) for key in ("accumulate", "offload")}
    assert revise(run, keys) == plain != run


def test_what_does_not_fit_says_what_would():
    for machine, config in set(LINES) - set(FITTING):
        with pytest.raises(ValueError, match=f"^{config} does not fit {machine}: "):
            run_of(config, machine)


def test_tiny_has_a_cut_of_its_own():
    run = run_of("wan_14b", "8gpu,tiny,scm")
    assert run == run_of("wan_14b", "scm,tiny,8gpu") and run.train.accumulate == run.mesh.data == 1
    prepare(run, *topologies.devices("cpu:8"))


def test_one_machine_at_most_and_only_where_it_has_a_line():
    with pytest.raises(ValueError, match="names 2 machines, 8gpu, v6e-8: choose one"):
        wan_1_3b.get_config("8gpu,v6e-8")
    with pytest.raises(ValueError, match="variant '8gpu' is none of"):
        digits.get_config("8gpu")


def test_the_table_of_machines_is_told():
    for name in MACHINES:
        assert f"| {name} | " in machines.__doc__
    assert not MACHINES.keys() & methods.METHODS.keys()
