"""Plans of tiny runs for eight CPU devices, from the config to the printed words; the table of chips; the sweep."""

import importlib
import math
import subprocess
import sys

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from rcm_jax.kernels.attention import flash_attention
from rcm_jax.parallel import chips, hlo
from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.plan import program, report, sweep, topologies
from rcm_jax.plan.program import Compiled, compile_program, prepare
from rcm_jax.run.experiment import from_mapping
from rcm_jax.util.config import revise
from rcm_jax.util.extras import installed
from tests import tiny

fast_compilation = pytest.fixture(scope="module")(tiny.fast_compilation)


def run_of(name, variant="tiny", **mesh):
    run = from_mapping(importlib.import_module(f"configs.{name}").get_config(variant).to_dict())
    return revise(run, {"mesh": revise(run.mesh, mesh)})


def plan(run, topology, names=None):
    """(programs, {name: planned}, all that would be printed)"""
    chip, devices = topologies.devices(topology)
    programs = prepare(run, chip, devices)
    planned = dict(report.plan(programs, chip, names))
    words = [report.head(programs, chip, topology), *(report.describe(n, p, chip) for n, p in planned.items())]
    return programs, planned, "\n".join(words)


@pytest.mark.usefixtures("fast_compilation")
class TestTinyRuns:
    def test_wan(self):
        programs, planned, words = plan(run_of("wan_14b", "tiny,scm", fsdp=4, seq=2), "cpu:8", ["student"])
        chip, student = chips.CHIPS["cpu"], planned["student"].need
        assert report.fits(planned["student"], chip)
        assert programs.held <= student.arguments < programs.held + 2**14  # the batch, and guidance's text
        assert student.work.flops > 0 and student.work.open_loops == 0
        assert {c.kind for c in student.work.collectives} >= {"all-gather", "all-reduce"}
        assert "mesh data 1 × fsdp 4 × seq 2" in words and "student: fits" in words and "all-gather: " in words
        rate = report.summary(programs, planned, chip)
        assert f"{student.estimate.step:.4g} s for a cycle of 1 iterations" in rate and "videos/s" in rate

    @pytest.mark.slow
    def test_cosmos(self):
        programs, planned, words = plan(run_of("cosmos_14b"), "cpu:8", ["sampler"])
        need = planned["sampler"].need
        assert need.work.flops > 0 and need.work.open_loops == 0
        assert "batch 8: 1 for each of data × fsdp = 8" in words and 'attention "blockwise"' in words
        for name, seconds in (("student", 5.0), ("critic", 3.0)):
            planned[name] = report.Planned(need._replace(estimate=report.Estimate(seconds, 1.0, 2.0)), 1.0, "")
        assert report.cycle_seconds(programs, planned) == (8.0, 2)  # update_freq 2
        assert "8 s for a cycle of 2 iterations" in report.summary(programs, planned, chips.CHIPS["cpu"])
        assert programs.run.rcm.open_trips == 1.5  # of 1 to 4 steps all but the last, on average

    def test_work_of_one_device_is_the_products_of_the_network(self):
        """A token's own products are twice the parameters of its matrices: the few that tokens share are small."""
        _, planned, _ = plan(revise(run_of("wan_14b"), {"train.batch_size": 1}), "cpu:1", ["sampler"])
        c, m, tokens, text, layers, steps = 24, 32, 12, 6, 2, 4
        block = tokens * 2 * (6 * c * c + 2 * c * m) + text * 2 * (2 * c * c) + 4 * tokens * c * (tokens + text)
        assert planned["sampler"].need.work.flops == pytest.approx(steps * layers * block, rel=0.25)


def test_every_program_of_every_kind_of_run_can_be_lowered():
    for name, variant, expected in [
        ("cosmos_2b", "tiny,scm", {"student", "sampler"}),
        ("wan_1_3b", "tiny,sct", {"student", "sampler"}),
        ("mixture", "", {"student", "critic", "sampler"}),
    ]:
        chip, devices = topologies.devices("cpu:1")
        programs = prepare(run_of(name, variant, data=1, fsdp=1), chip, devices)
        assert set(programs.lower) == expected
        programs.lower["student"]()


def test_what_the_run_would_refuse_is_refused():
    chip, devices = topologies.devices("cpu:8")
    with pytest.raises(ValueError, match="batch size 8 does not divide over data × fsdp = 1 × 3"):
        prepare(run_of("wan_14b", fsdp=3), chip, devices[:3])
    for attention in ("triton", "fa4"):
        with pytest.raises(ValueError, match=f'"{attention}" cannot be compiled here'):
            prepare(revise(run_of("wan_14b"), {"model.attention": attention}), chip, devices)


def test_a_refusal_of_the_compiler_for_want_of_memory_is_a_result():
    def lower():
        raise jax.errors.JaxRuntimeError("XLA:TPU: RESOURCE_EXHAUSTED: Ran out: 609.42G of 95.74G.\nmore")

    compiled = compile_program(lower, chips.CHIPS["v5p"])
    assert compiled == Compiled(None, compiled.seconds, "does not fit: Ran out: 609.42G of 95.74G.")
    words = report.describe("student", report.Planned(None, 1.0, compiled.refusal), chips.CHIPS["v5p"])
    assert "student: does not fit: Ran out: 609.42G of 95.74G." in words


class TestAttention:
    """Kernels of the platform, where XLA need not partition them."""

    def test_kernels_outside_of_shard_map_are_found(self):
        def attend(x):
            return flash_attention(x, x, x, implementation="pallas_tpu")

        mesh, x = make_mesh(MeshConfig(data=8)), jnp.zeros((8, 16, 2, 16))
        inside = jax.shard_map(attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        assert program._outside_shard_map(jax.make_jaxpr(jax.jit(attend))(x).jaxpr)
        assert not program._outside_shard_map(jax.make_jaxpr(jax.jit(inside))(x).jaxpr)

    def test_the_choice_is_said(self, monkeypatch):
        v5p, devices = chips.CHIPS["v5p"], topologies.devices("cpu:1")[1]
        run = run_of("cosmos_14b", data=1, fsdp=1)
        assert prepare(run, v5p, devices).note == 'attention "pallas_tpu"'
        monkeypatch.setattr(program, "_outside_shard_map", lambda jaxpr: True)
        run = revise(run, {"mesh.fsdp": 8})
        programs = prepare(run, v5p, topologies.devices("cpu:8")[1])
        assert programs.attention == "blockwise" and "NOT the kernels" in programs.note
        monkeypatch.setattr(program, "installed", lambda package: False)
        assert "jax-triton is not installed" in prepare(run, chips.CHIPS["h100"], topologies.devices("cpu:8")[1]).note


def test_the_script_says_in_a_line_what_is_wrong():
    arguments = ["--config=wan_14b.py", "--topology=v5q:4x4x4"]
    root = topologies.pathlib.Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "scripts/plan.py", *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: topology 'v5q:4x4x4' is none of")


class TestChips:
    @pytest.mark.parametrize("topology", ["v5p", "h300:1x8", "v5p:0x4", "h100:8x", "cpu:8; rm"])
    def test_unknown(self, topology):
        with pytest.raises(ValueError, match="is none of CHIP:SIZES"):
            topologies.devices(topology)

    def test_too_many(self):
        with pytest.raises(ValueError, match="xla_force_host_platform_device_count=64"):
            topologies.devices("cpu:64")

    @pytest.mark.parametrize(
        "topology, package, words",
        [
            ("v5p:2x2x1", "libtpu", r"needs libtpu, no TPU: pip install 'rcm-jax\[tpu\]'"),
            ("h100:1x8", "jax_plugins.xla_cuda12", f"--no-deps jax-cuda12-plugin=={jax.__version__} "),
        ],
    )
    def test_what_to_install(self, topology, package, words):
        """As a plain machine has it: what looks for the package is the real thing."""
        if installed(package):
            pytest.skip(f"{package} is here")
        with pytest.raises(ValueError, match=words):
            topologies.devices(topology)

    def test_descriptions_of_gpus_say_what_the_table_says(self):
        for chip in chips.CHIPS.values():
            if chip.target:
                text = (topologies.pathlib.Path(topologies.__file__).parent / chip.target).read_text()
                assert f"device_memory_size: {chip.hbm:.0f}" in text
                assert float(text.split("memory_bandwidth: ")[1].split()[0]) == pytest.approx(chip.bandwidth, rel=0.01)

    def test_hosts_exchange_what_they_have_summed(self):
        """8 hosts × 8: a group of 64 over the network between hosts, one of 8 within."""
        h100, v5p = chips.CHIPS["h100"], chips.CHIPS["v5p"]
        everywhere = hlo.Collective("all-reduce", 64_000, tuple(range(64)), 1)
        assert topologies.moved(everywhere) == 2 * 63_000
        assert topologies.seconds(h100, everywhere) == 2 * 64_000 / 8 * 7 / 8 / h100.network
        assert topologies.seconds(v5p, everywhere) == 2 * 63_000 / v5p.link
        gathered = hlo.Collective("all-gather", 1_000, tuple(range(64)), 1)
        assert topologies.seconds(h100, gathered) == max(7_000 / h100.network, 63_000 / h100.link)
        within = hlo.Collective("all-to-all", 8_000, tuple(range(8)), 1)
        assert topologies.seconds(h100, within) == 7_000 / h100.link


class TestSweep:
    def test_meshes_divide_chips_batch_heads_and_tokens(self):
        found = sweep.meshes(chips=16, batch=8, heads=12, tokens=40)
        assert found and all(d * f * s == 16 and 8 % (d * f) == 0 and 12 % s == 0 and 40 % s == 0 for d, f, s in found)
        assert {seq for _, _, seq in found} == {2, 4}  # 1 has too few samples, 8 does not divide 12 heads
        assert len(found) == len(set(found)) == 4 + 3

    def test_tokens_of_a_run(self):
        chip, devices = topologies.devices("cpu:1")
        for name, tokens in [("wan_14b", 21 * 30 * 52), ("cosmos_14b", 48 * 85)]:
            programs = prepare(run_of(name, "", data=1, fsdp=1, seq=1), chip, devices)
            assert sweep.tokens_of(programs) == tokens
            network = 14.0e9 if name == "wan_14b" else 14.2e9
            # Student, its second moment, EMA, fake score and its second moment in float32; the teacher in bfloat16.
            assert programs.held == pytest.approx(network * (5 * 4 + 2), rel=0.03)

    def test_rows_are_ranked_and_what_does_not_fit_is_last(self):
        rows = [
            sweep.Row((1, 8, 1), "full", 8, {}, math.inf, "does not fit: student: 1"),
            sweep.Row((1, 4, 2), "none", 8, {}, 2.0, "slow"),
            sweep.Row((8, 1, 1), "none", 8, {}, 1.0, "fast"),
        ]
        assert [line.split()[-1] for line in sweep.table(rows).splitlines()[1:]] == ["fast", "slow", "1"]

    @pytest.mark.usefixtures("fast_compilation")
    def test_a_table_of_topologies_and_its_picture(self, tmp_path):
        run = run_of("wan_14b", "tiny,scm")
        rows = list(sweep.scale(run, ["cpu:1", "cpu:4"], batch_per_chip=2))
        assert [(row.mesh, row.batch) for _, row in rows] == [((1, 1, 1), 2), ((1, 4, 1), 8)]
        one, four = (row.steps["student"].need for _, row in rows)
        assert report.received(one.work) == 0 < report.received(four.work)
        cells = sweep.line(*rows[1]).split(" | ")
        assert len(cells) == sweep.HEAD.count("|") - 1 and cells[:3] == ["| cpu:4", "1 × 4 × 1", "8"]
        assert cells[3] == report.gib(four.peak) and cells[4] == ""  # sCM alone has no critic
        sweep.draw(rows, tmp_path / "curve.png")
        assert imageio.imread(tmp_path / "curve.png").std() > 1
        [(_, refused)] = sweep.scale(run, ["cpu:3"])  # a batch of 8
        assert "refused: batch size 8 does not divide" in sweep.line("cpu:3", refused)

    @pytest.mark.slow
    def test_a_sweep(self):
        chip, devices = topologies.devices("cpu:2")
        rows = list(sweep.sweep(run_of("wan_14b"), chip, devices, ["full"]))
        assert [row.mesh for row in rows] == [(1, 2, 1), (2, 1, 1), (1, 1, 2)]
        assert all(row.seconds < 1 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, package", [("v5p:2x2x1", "libtpu"), ("v6e:2x2", "libtpu"), ("h100:2x2", "jax_plugins.xla_cuda12")]
)
def test_accelerators_that_are_not_here(topology, package, monkeypatch):
    """Minutes. Two processes at once need ALLOW_MULTIPLE_LIBTPU_LOAD=1, for libtpu holds a lock file."""
    pytest.importorskip(package)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    programs, planned, words = plan(run_of("wan_14b"), topology, ["critic"])
    need = planned["critic"].need
    assert need.work.flops > 0 and need.work.collectives and need.work.open_loops == 1
    assert programs.attention == "blockwise" or not need.work.kernels
    assert "critic: fits" in words
