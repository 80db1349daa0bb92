"""The benchmark on shapes that take no time: what it counts, what it leaves out and why, what it prints and writes."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.kernels import attention, bench
from rcm_jax.kernels.workloads import REAL, WORKLOADS, Workload
from tests import tiny

# The claims do not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

SELF = Workload("tiny", 2, 24, 24, 3, 8)
CROSS = Workload("tiny_cross", 2, 24, 16, 3, 8)
PASSES = ["forward", "forward + tangent", "forward + backward"]
NEEDS_GPU = "its kernels are for a GPU, and the device is a CPU"


def device(**memory):
    """An accelerator that is not there: what runs on it runs on the CPU."""
    stats = {"bytes_limit": 2**33, "peak_bytes_in_use": 0} | memory
    return types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: stats)


def row(result, name, side):
    (found,) = (x for x in result["rows"] if (x["pass"], x["side"]) == (name, side))
    return found


@pytest.fixture(scope="module")
def report():
    """Two implementations on tiny self-attention, and the kernels for a machine that this is not."""
    return bench.report(SELF, "float32", ["reference", "auto", "blockwise", "triton"], repeats=2, matmul_size=32)


def test_workloads():
    assert all(name == w.name and w.cross == name.endswith("_cross") for name, w in WORKLOADS.items())
    assert {name.split("_")[0] for name in REAL} == {"wan", "cosmos"}
    assert set(REAL) == {name for name in WORKLOADS if not name.startswith("cpu_")}


class TestReport:
    def test_a_row_for_each_pass_and_side_that_runs(self, report):
        sides = ["plain", "reference", "blockwise"]  # "auto" is "blockwise" here, once
        assert [(x["pass"], x["side"]) for x in report["rows"]] == [(p, s) for p in PASSES for s in sides]

    @pytest.mark.parametrize(
        ("workload", "flops"),
        [  # by hand: 2·(2·24·24·3·8) = 55,296 operations a product of self-attention, 36,864 of cross-attention
            (SELF, {"forward": 110_592, "forward + tangent": 387_072, "forward + backward": 387_072}),
            (CROSS, {"forward": 73_728, "forward + tangent": 184_320, "forward + backward": 258_048}),
        ],
    )
    def test_rates_and_ratios(self, workload, flops, report):
        if workload is CROSS:
            report = bench.report(CROSS, "float32", ["blockwise"], repeats=1, matmul_size=32)
        assert report["matmul"]["size"] == 32
        for x in report["rows"]:
            plain = row(report, x["pass"], "plain")
            assert x["seconds"] > 0
            assert x["tflops"] * x["seconds"] == pytest.approx(flops[x["pass"]] / 1e12)
            assert x["of_matmul"] == pytest.approx(x["tflops"] / report["matmul"]["tflops"])
            assert x["time_ratio"] == pytest.approx(plain["seconds"] / x["seconds"])
            assert x["memory_ratio"] == pytest.approx(plain["temp_bytes"] / max(x["temp_bytes"], 1))

    def test_the_counts_are_the_products_that_blockwise_makes(self):
        def products(jaxpr):
            inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values()))]
            own = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
            return own + sum(products(x) for x in inner if hasattr(x, "eqns"))

        x = jnp.ones((1, 8, 1, 4))
        for cross in (False, True):
            for name, function in bench.passes(attention.flash_attention, cross).items():
                assert products(jax.make_jaxpr(function)(*[x] * 7).jaxpr) == bench.PRODUCTS[name][cross]

    def test_what_is_not_for_this_machine_is_left_out_with_the_reason(self, report):
        triton = [{"side": "triton", "pass": name, "reason": NEEDS_GPU} for name in PASSES]
        fused = {"side": "triton fused", "pass": "forward + tangent", "reason": NEEDS_GPU}
        assert report["left_out"] == [*triton, fused]

    def test_json_can_hold_it(self, report):
        assert json.loads(json.dumps(report)) == report

    def test_without_repeats_nothing_is_run(self, monkeypatch):
        monkeypatch.setattr(bench.Program, "seconds", None)
        huge = Workload("huge", 1, 2**17, 2**17, 1, 8)  # 64 GiB of scores
        result = bench.report(huge, "float32", ["blockwise"], repeats=0)
        assert len(result["rows"]) == 6 and not result["left_out"]
        assert row(result, "forward", "plain")["temp_bytes"] >= 2**36
        assert all(x["memory_ratio"] > 100 for x in result["rows"] if x["side"] == "blockwise")
        assert {x["seconds"] for x in result["rows"]} == {None} == {result["matmul"]["tflops"]}

    def test_plain_is_left_out_where_its_scores_do_not_fit(self, monkeypatch):
        monkeypatch.setattr(
            bench, "CPU_LIMIT", 40_000
        )  # 2·3·24·24 float32 scores are 13,824 bytes: two fit, four do not
        result = bench.report(SELF, "float32", ["blockwise"], repeats=1, matmul_size=32)
        assert [x["pass"] for x in result["rows"] if x["side"] == "plain"] == ["forward"]
        assert {(x["side"], x["pass"]) for x in result["left_out"]} == {("plain", name) for name in PASSES[1:]}
        assert row(result, "forward + tangent", "blockwise")["time_ratio"] is None

    def test_the_reason_has_the_numbers(self):
        reason = bench.why_not("plain", "forward + tangent", WORKLOADS["wan_14b"], device(bytes_limit=60 * 2**30), True)
        assert reason == "its [queries, keys] arrays take 639.7 GiB of 60.0: try --heads"  # 4·4·40·32,760² bytes
        assert bench.why_not("plain", "forward", WORKLOADS["cosmos_2b"], device(), True) is None
        assert bench.why_not("pallas_tpu fused", PASSES[1], SELF, device(), False).startswith(
            "its kernels are for a TPU"
        )


class TestAccelerator:
    def test_cudnn_has_no_forward_mode_and_fused_kernels_no_other(self):
        sides = bench.sides(["blockwise", "triton", "pallas_tpu"], False, device())
        assert {side: list(functions) for side, functions in sides.items()} == {
            "plain": PASSES,
            "cudnn": ["forward", "forward + backward"],
            "blockwise": PASSES,
            "triton": PASSES,
            "triton fused": ["forward + tangent"],
            "pallas_tpu": PASSES,
            "pallas_tpu fused": ["forward + tangent"],
        }

    @pytest.mark.parametrize("workload", [SELF, CROSS], ids=["self", "cross"])
    def test_a_fused_kernel_is_given_what_the_op_is_given(self, workload, monkeypatch):
        """The reference's functions in the place of the kernel: value and tangent are those of the op."""
        reference = attention.IMPLEMENTATIONS["reference"]

        def forward_tangent(q, k, v, dq, dk, dv, scale):
            o, lse = reference.forward(q, k, v, scale)
            return o, lse, reference.tangent(q, k, v, o, lse, dq, dk, dv, scale)

        monkeypatch.setitem(bench.FUSED, "reference", forward_tangent)
        sides = bench.sides(["reference"], workload.cross, device())
        lengths = [workload.q_len, workload.k_len, workload.k_len] * 2 + [workload.q_len]
        args = [jax.random.normal(jax.random.key(i), (2, length, 3, 8)) for i, length in enumerate(lengths)]
        fused, split = (jax.jit(sides[x]["forward + tangent"])(*args) for x in ("reference fused", "reference"))
        for x, y in zip(fused, split, strict=True):
            assert jnp.allclose(x, y, rtol=1e-6, atol=1e-6)

    def test_what_does_not_compile_is_left_out_and_the_rest_goes_on(self):
        programs, left_out = bench.compile_all(CROSS, "float32", ["triton"], device(), False, 32)
        assert [side for side, _ in programs] == ["plain"] * 3
        assert left_out["cudnn", "forward"] == "RuntimeError: cuDNN is not detected."
        assert left_out["triton", "forward + backward"].startswith("ValueError: ")
        assert left_out["triton fused", "forward + tangent"].startswith("ValueError: ")

    def test_what_does_not_run_is_left_out_and_the_rest_goes_on(self):
        """Samples of many runs; smallest first; a peak is told where it rose."""
        there, started = device(), []

        class Fake:
            def __init__(self, name, temp_bytes, peak, error=None):
                self.name, self.temp_bytes, self.peak, self.error = name, temp_bytes, peak, error

            def seconds(self, runs=1):
                started.append((self.name, runs))
                if self.error:
                    raise RuntimeError(self.error)
                there.memory_stats()["peak_bytes_in_use"] = max(there.memory_stats()["peak_bytes_in_use"], self.peak)
                return 0.02

        fakes = [Fake("large", 3, 30), Fake("full", 2, 0, "RESOURCE_EXHAUSTED:\n 9 GiB"), Fake("small", 1, 40)]
        seconds, peaks, failed = bench.measure({fake.name: fake for fake in fakes}, 2, there)
        warm_up = [("small", 1), ("small", 1), ("full", 1), ("large", 1), ("large", 1)]
        assert started == warm_up + [("large", 5), ("small", 5)] * 2  # 0.1 s a sample
        assert seconds == {"large": 0.02, "small": 0.02}
        assert peaks == {"small": 40, "large": None}
        assert failed == {"full": "RuntimeError: RESOURCE_EXHAUSTED: 9 GiB"}


class TestCommand:
    def test_tables_and_json(self, report, monkeypatch, tmp_path, capsys):
        asked = []

        def recorded(workload, *others):
            asked.append(others)
            return report | {"workload": vars(workload), "repeats": 0}

        monkeypatch.setattr(bench, "WORKLOADS", {"cpu_8192": SELF, "other": CROSS})
        monkeypatch.setattr(bench, "report", recorded)
        path = tmp_path / "bench.json"
        flags = ["--implementation=auto", "--implementation=triton", "--repeats=0", "--heads=2", f"--json={path}"]
        bench.main(["--workload=cpu_8192", "--workload=other", *flags])
        assert asked == [("float32", ["auto", "triton"], 0)] * 2
        out = capsys.readouterr().out
        assert "tiny: batch 2, 24 queries, 24 keys, 2 heads of 8, float32, 0 repeats" in out
        assert out.count("note: 2 of 3 heads") == 2
        assert out.splitlines().count(f"left out: triton ({', '.join(PASSES)}): {NEEDS_GPU}") == 2
        written = json.loads(path.read_text())
        assert {"date", "python", "jax", "device", "machine"} == set(written["environment"])
        assert [x["workload"]["name"] for x in written["results"]] == ["tiny", "tiny_cross"]
        assert [x["workload"]["heads"] for x in written["results"]] == [2, 2]

    def test_a_table_has_the_columns_that_were_measured(self, report, capsys):
        bench.show(report)
        out = capsys.readouterr().out
        assert "TFLOP/s" in out and "of matmul" in out and "peak" not in out
        lines = out.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("forward "))
        assert len({len(line) for line in lines[first - 1 : first + 9]}) == 1  # aligned

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--implementation=cudnn"], "'cudnn'"),
            (["--workload=wan"], "'wan'"),
            (["--heads=0"], "at least 1, got '0'"),
            (["--repeats=-1"], "at least 0, got '-1'"),
        ],
    )
    def test_what_is_not_known_is_refused(self, flags, message, capsys):
        with pytest.raises(SystemExit) as stop:
            bench.main(flags)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

    def test_all_are_the_real_ones_each_once(self):
        args = bench.arguments(["--workload=wan_14b", "--workload=all", "--workload=cpu_2048"])
        names = [w.name for w in args.workload]
        assert names[0] == "wan_14b" and names[-1] == "cpu_2048"
        assert sorted(names[:-1]) == sorted(REAL)
        assert [w.name for w in bench.arguments([]).workload] == ["cpu_8192"]
