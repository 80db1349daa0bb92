"""What the check measures, what it lets pass, and `python -m kernels.check`."""

import json
import math

import jax.numpy as jnp
import pytest

from rcm_jax.kernels import accuracy, bench, check
from rcm_jax.kernels.accuracy import Case, Finding, cases, findings
from rcm_jax.kernels.implementations import IMPLEMENTATIONS, PASSES, Implementation
from rcm_jax.kernels.masks import BlockCausal
from rcm_jax.kernels.workloads import Workload
from tests import tiny

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

REFERENCE = IMPLEMENTATIONS["reference"]


class TestFindings:
    @pytest.mark.parametrize("name", ["value", "forward"])
    def test_one_key_too_many_among_hundreds_is_seen(self, name, monkeypatch):
        """A key of zeros behind the last, as a kernel has it that forgets where its last tile ends. In bfloat16, where
        rounding is coarse."""

        def wrong(q, k, v, *rest):
            k, v = (jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1) for x in (k, v))
            return REFERENCE.does(name)(q, k, v, *rest)

        monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation(**{name: wrong}))
        case = Case(300, 300)
        found = findings([(name, "wrong"), (name, "reference")], 64, "bfloat16", [case])
        assert found[name, "wrong", case].error > 5 * accuracy.TOLERANCE["bfloat16"]
        assert found[name, "reference", case].error < accuracy.TOLERANCE["bfloat16"] / 4

    @pytest.mark.parametrize("dtype", accuracy.TOLERANCE)
    @pytest.mark.parametrize(
        "case", [Case(20, 20), Case(20, 12), Case(8, 20, BlockCausal(6, window=2, sink=1))], ids=str
    )
    def test_what_is_right_passes(self, dtype, case):
        for found in findings([(name, "reference") for name in PASSES], 16, dtype, [case]).values():
            assert not found.why_not(case, dtype) and math.isfinite(found.error)

    def test_text_does_not_move(self, monkeypatch):
        moving = []

        def tangent(q, k, v, o, lse, dq, dk, dv, scale):
            moving.append([x is not None for x in (dq, dk, dv)])
            return REFERENCE.tangent(q, k, v, o, lse, dq, dk, dv, scale)

        monkeypatch.setitem(IMPLEMENTATIONS, "noted", Implementation(tangent=tangent))
        findings([("tangent", "noted")], 8, "float32", [Case(6, 6), Case(6, 4)])
        assert moving == [[True, True, True], [True, False, False]]

    def test_outputs_of_another_shape_or_beyond_all_numbers(self, monkeypatch):
        monkeypatch.setitem(IMPLEMENTATIONS, "short", Implementation(value=lambda q, k, v, scale: q[:, :-1]))
        monkeypatch.setitem(IMPLEMENTATIONS, "infinite", Implementation(value=lambda q, k, v, scale: q / 0))
        case = Case(6, 6)
        for found in findings([("value", "short"), ("value", "infinite")], 8, "float32", [case]).values():
            assert math.isnan(found.error) and "error nan of O at 6 × 6" in found.why_not(case, "float32")

    def test_a_refusal_is_not_a_failure(self):
        (found,) = findings([("value", "cudnn")], 8, "float32", [Case(6, 6)]).values()
        assert found == Finding(math.inf, "ValueError: cuDNN's attention takes bfloat16 and float16, got float32", True)


@pytest.mark.parametrize("tokens", [64, 1000, 4080, 31_200, 32_760, 32_768])
def test_cases_are_short_and_end_as_the_runs_do(tokens):
    own, text = cases(tokens, masked=False)
    assert own.l == own.m == text.l < 2 * accuracy.TILE and text.m != text.l
    assert own.l == tokens or (own.l - tokens) % accuracy.TILE == 0
    masked = cases(tokens, masked=True)
    assert all(case.m == own.l and 0 < case.l <= case.m for case in masked)
    hidden = [1 - case.mask.seen(case.l, case.m).mean() for case in masked]
    assert all(0.1 < share < 0.9 for share in hidden)


class TestCommand:
    @pytest.fixture
    def small(self, monkeypatch):
        workload = Workload("cpu_2048", 1, 16, 16, 1, 8)
        monkeypatch.setattr(check, "WORKLOADS", {"cpu_2048": workload})
        monkeypatch.setattr(check, "CASES", (Case(12, 12), Case(12, 7)))
        report = bench.report
        monkeypatch.setattr(bench, "report", lambda *args: report(*args, matmul_size=32))

    def test_table_times_and_json(self, small, tmp_path, capsys):
        path = tmp_path / "check.json"
        check.main(["--dtype=float32", "--head_size=64", "--repeats=1", f"--json={path}"])
        out = capsys.readouterr().out
        assert "heads of 64, float32" in out and " !" not in out
        assert '"auto" takes here: "blockwise"\n' in out
        written = json.loads(path.read_text())
        (table,), (timed,) = written["errors"], written["times"]
        assert {(row["implementation"], row["pass"]) for row in table["rows"]} == {
            (name, what) for name in ("blockwise", "reference") for what in PASSES
        }
        assert all(row["error"] < 1e-4 and not row["why_not"] for row in table["rows"])
        assert set(timed["fastest"]) == {"value", "tangent", "backward"}

    def test_what_is_wrong_is_marked_and_not_recommended(self, small, monkeypatch, capsys):
        def wrong(*args):
            return REFERENCE.tangent(*args) + 1

        monkeypatch.setitem(IMPLEMENTATIONS, "reference", REFERENCE._replace(tangent=wrong))
        check.main(["--dtype=float32", "--head_size=64", "--repeats=0"])
        out = capsys.readouterr().out
        assert out.count(" !") == 1 and "! reference (tangent): error " in out

    def test_fastest(self):
        rows = [
            {"pass": timed, "side": side, "seconds": seconds}
            for side, times in {"a": (3, 1, 1), "b": (2, 2, 2), "plain": (1, 1, 1), "cudnn": (1, None, None)}.items()
            for timed, seconds in zip((bench.FORWARD, bench.TANGENT, bench.BACKWARD), times, strict=True)
        ]
        with pytest.MonkeyPatch.context() as patch:
            for name in "ab":
                patch.setitem(IMPLEMENTATIONS, name, REFERENCE)
            assert check.fastest(rows, set()) == {"value": "cudnn", "tangent": "a", "backward": "a"}
            refused = {("cudnn", "value"), ("a", "tangent")}
            assert check.fastest(rows, refused) == {"value": "b", "tangent": "b", "backward": "a"}
            refused = {("cudnn", "value"), ("a", "forward")}
            assert check.fastest(rows, refused) == {"value": "b", "tangent": "b", "backward": "b"}

    def test_what_may_run_on_a_backend(self):
        assert check.implementations("gpu") == ["fa4", "cudnn", "triton", "blockwise"]
        assert check.implementations("tpu") == ["pallas_tpu", "blockwise"]
        assert check.implementations("cpu") == ["blockwise", "reference"]
