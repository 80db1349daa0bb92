"""What flash_attention takes, which implementations it chooses for its passes, and what it logs of that."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rcm_jax.kernels import bench, choice, implementations
from rcm_jax.kernels.accuracy import Case
from rcm_jax.kernels.attention import flash_attention
from rcm_jax.kernels.implementations import IMPLEMENTATIONS, PASSES, Implementation
from rcm_jax.kernels.masks import BlockCausal
from rcm_jax.run.experiment import Predictor
from rcm_jax.run.program import make_network, zeros
from tests import cosmos, tiny, wan
from tests.kernels.spoiled import REFERENCE, not_a_number, off, raising, refusing, spoiled

# What is chosen does not depend on XLA's optimisations, and compiling takes half the time without them.
fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

ALL_BLOCKWISE = dict.fromkeys(PASSES, "blockwise")


class TestInputs:
    @pytest.mark.parametrize(
        ("q", "k", "v", "error", "message"),
        [
            ((2, 8, 16), (2, 8, 16), (2, 8, 16), ValueError, r"four axes"),
            ((2, 8, 4, 16), (3, 8, 4, 16), (3, 8, 4, 16), ValueError, r"equal batch sizes.*q \(2, .*k \(3, "),
            ((2, 8, 4, 16), (2, 8, 2, 16), (2, 8, 2, 16), ValueError, r"equal numbers of heads.*repeat"),
            ((2, 8, 4, 16), (2, 8, 4, 16), (2, 8, 4, 32), ValueError, r"equal feature sizes.*32"),
            ((2, 8, 4, 16), (2, 9, 4, 16), (2, 7, 4, 16), ValueError, r"9 keys and 7 values"),
            ((2, 0, 4, 16), (2, 8, 4, 16), (2, 8, 4, 16), ValueError, r"at least 1"),
            ((2, 8, 4, 16), (2, 0, 4, 16), (2, 0, 4, 16), ValueError, r"at least 1"),
        ],
    )
    def test_shapes(self, q, k, v, error, message):
        with pytest.raises(error, match=message):
            flash_attention(jnp.ones(q), jnp.ones(k), jnp.ones(v))

    def test_dtypes(self):
        x = jnp.ones((1, 8, 2, 4), "float32")
        with pytest.raises(TypeError, match=r"q float32, k bfloat16, v float32: cast"):
            flash_attention(x, x.astype(jnp.bfloat16), x)
        with pytest.raises(TypeError, match=r"floating point arrays, got int32"):
            flash_attention(*[x.astype(jnp.int32)] * 3)

    def test_implementations(self):
        x = jnp.ones((1, 8, 2, 4), "float32")
        names = "'auto', 'reference', 'blockwise', 'triton', 'pallas_tpu', 'fa4'"
        with pytest.raises(ValueError, match=rf"'cudnn'.*\[{names}\]"):  # it has not every pass
            flash_attention(x, x, x, implementation="cudnn")


WRONG = {"off": off, "not_a_number": not_a_number, "raising": raising, "refusing": refusing}


@pytest.fixture
def candidates(monkeypatch, caplog):
    """Makes implementations the candidates of this backend for every pass, in that order; checked in one small case."""

    def put(**named):
        for name, implementation in named.items():
            monkeypatch.setitem(IMPLEMENTATIONS, name, implementation)
        monkeypatch.setitem(choice.CANDIDATES, "cpu", dict.fromkeys(PASSES, tuple(named)))

    monkeypatch.setattr(choice, "_settled", {})
    masked = Case(9, 12, BlockCausal(5))
    monkeypatch.setattr(choice, "cases", lambda tokens, with_mask: (masked if with_mask else Case(12, 12),))
    choice._warn_unsettled.cache_clear()
    caplog.set_level(logging.INFO, choice.__name__)
    return put


class TestOneProcess:
    @pytest.mark.parametrize("name", PASSES)
    def test_what_is_wrong_in_one_pass_is_used_for_the_others(self, candidates, caplog, name):
        candidates(ours=spoiled(off, name))
        assert choice.settle(4, "float32") == dict.fromkeys(PASSES, "ours") | {name: "blockwise"}
        first, warning = caplog.records
        assert first.levelname == "INFO" and f'{name} by "blockwise"' in first.message
        assert warning.levelname == "WARNING"
        words = f'heads of 4, float32: "ours" is not used for {name} (error '
        assert words in warning.message and "at 12 × 12, and 1e-04 may be" in warning.message
        assert warning.message.endswith('"blockwise" takes over, which is slower')

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [("off", "error "), ("not_a_number", "error nan of"), ("raising", "RuntimeError: no such instruction")],
    )
    def test_the_next_takes_over_and_the_failure_is_named(self, candidates, caplog, wrong, words):
        candidates(first=spoiled(WRONG[wrong], *PASSES), second=REFERENCE)
        assert choice.settle(4, "bfloat16") == dict.fromkeys(PASSES, "second")
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert warnings and all('"first" is not used for ' in x and words in x for x in warnings)
        assert all(x.endswith('"second" takes over') for x in warnings)
        assert {name for x in warnings for name in PASSES if name in x.partition("(")[0]} == set(PASSES)

    def test_what_refuses_is_named_only_where_nothing_else_is_fast(self, candidates, caplog):
        candidates(first=spoiled(refusing, *PASSES), second=spoiled(refusing, "tangent"))
        assert choice.settle(4, "float32") == dict.fromkeys(PASSES, "second") | {"tangent": "blockwise"}
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert [x.partition(" is not used for tangent (ValueError: not made for this)")[0][-8:] for x in warnings] == [
            ' "first"',
            '"second"',
        ]

    def test_a_value_may_be_all_that_one_has(self, candidates):
        candidates(quick=Implementation(value=REFERENCE.does("value")), ours=REFERENCE)
        choice.CANDIDATES["cpu"] |= dict.fromkeys(PASSES[1:], ("ours",))
        assert choice.settle(4, "float32") == dict.fromkeys(PASSES, "ours") | {"value": "quick"}

    def test_each_call_has_the_passes_that_were_chosen(self, candidates):
        called = []

        def noted(what, function):
            def call(*args, **options):
                called.append(what)
                return function(*args, **options)

            return call

        ours = Implementation(**{name: noted(name, REFERENCE.does(name)) for name in PASSES[1:]})
        quick = Implementation(value=noted("quick", REFERENCE.does("value")))
        candidates(ours=ours, quick=quick)
        choice.CANDIDATES["cpu"] |= dict.fromkeys(PASSES, ("ours",)) | {"value": ("quick",)}
        x = jnp.ones((1, 6, 2, 4))
        choice.settle(4, "float32")
        for function, expected in (
            (lambda: flash_attention(x, x, x), {"quick"}),
            (lambda: jax.jvp(lambda x: flash_attention(x, x, x), (x,), (x,)), {"forward", "tangent"}),
            # tangent: its shape is asked for
            (lambda: jax.grad(lambda x: flash_attention(x, x, x).sum())(x), {"forward", "tangent", "backward"}),
        ):
            called.clear()
            function()
            assert set(called) == expected

    def test_once_for_each_size_of_heads_and_dtype(self, candidates, monkeypatch):
        asked = []
        monkeypatch.setattr(choice, "findings", lambda pairs, *key: asked.append(key) or {})
        candidates(ours=REFERENCE)
        for _ in range(2):
            for size, dtype in ((4, "float32"), (8, jnp.bfloat16)):
                choice.settle(size, dtype)
                choice.settle(size, dtype, 100, masked=True)
        assert [(size, dtype, cases[0].mask is not None) for size, dtype, cases in asked] == [
            (4, "float32", False),
            (4, "float32", True),
            (8, "bfloat16", False),
            (8, "bfloat16", True),
        ]

    def test_a_mask_is_checked_by_itself(self, candidates, caplog):
        def blind(function):
            return lambda *args, mask=None: function(*args)

        candidates(ours=spoiled(blind, *PASSES))
        assert choice.settle(4, "float32") == dict.fromkeys(PASSES, "ours")
        assert choice.settle(4, "float32", masked=True) == ALL_BLOCKWISE
        assert "masked" in caplog.messages[-1] and "9 × 12 under BlockCausal" in caplog.messages[-1]

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_nothing_is_checked_where_there_is_no_candidate(self, candidates, monkeypatch, dtype):
        monkeypatch.setattr(choice, "findings", None)
        if dtype == "float64":
            candidates(ours=REFERENCE)
        assert choice.settle(4, dtype) == ALL_BLOCKWISE
        assert choice.implementation("auto", 4, dtype) is IMPLEMENTATIONS["blockwise"]

    def test_what_is_forced_is_not_checked(self, candidates, monkeypatch, caplog):
        monkeypatch.setattr(choice, "findings", None)
        candidates(ours=spoiled(off, *PASSES))
        choice._log_asked.cache_clear()
        x = jnp.ones((1, 6, 2, 4))
        for _ in range(2):
            assert jnp.allclose(flash_attention(x, x, x, implementation="ours"), x + 0.1)
        assert caplog.messages == ['attention on cpu: "ours", as asked']

    def test_the_gpus_and_tpus_candidates(self):
        assert all(set(named) == set(PASSES) for named in choice.CANDIDATES.values())
        assert set(choice.CANDIDATES) == set(implementations.KERNELS)
        for backend, named in choice.CANDIDATES.items():
            assert all(named[name][-1] == implementations.KERNELS[backend] for name in PASSES)
            assert all(IMPLEMENTATIONS[each].does(name) for name in PASSES for each in named[name])
        assert set(implementations.KERNELS.values()) == set(bench.FUSED) <= set(choice.choices())


def mapped(attend, x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    return jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(x)


TRACED = {
    "eager": lambda attend, x: attend(x),
    "jit": lambda attend, x: jax.jit(attend)(x),
    "jvp": lambda attend, x: jax.jvp(attend, (x,), (x,))[0],
    "grad": lambda attend, x: jax.grad(lambda x: jnp.sum(attend(x) ** 2))(x),
    "scan": lambda attend, x: jax.lax.scan(lambda x, _: (attend(x), None), x, None, length=2)[0],
    "remat": lambda attend, x: jax.grad(lambda x: jnp.sum(jax.checkpoint(attend)(x) ** 2))(x),
    "shard_map": mapped,
    "jit of shard_map": lambda attend, x: jax.jit(functools.partial(mapped, attend))(x),
    "eval_shape": lambda attend, x: attend(x) if jax.eval_shape(attend, x) else None,
}


@pytest.mark.parametrize("around", TRACED)
def test_the_check_runs_in_the_middle_of_tracing(candidates, around):
    candidates(ours=spoiled(off, "tangent"))
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    result = TRACED[around](lambda x: flash_attention(x, x, x), x)
    assert [*choice._settled.values()] == [dict.fromkeys(PASSES, "ours") | {"tangent": "blockwise"}]
    expected = TRACED[around](lambda x: flash_attention(x, x, x, implementation="blockwise"), x)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


class TestSeveralProcesses:
    def test_a_call_alone_settles_nothing(self, candidates, monkeypatch, caplog):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        candidates(ours=REFERENCE)
        for _ in range(2):
            assert choice.implementation("auto", 4, "float32") is IMPLEMENTATIONS["blockwise"]
        assert not choice._settled
        (warning,) = caplog.records
        assert warning.levelname == "WARNING"
        assert '"blockwise", which is slower' in warning.message and "settle, which all of them" in warning.message

    def test_two_agree(self):
        """Real ones. What the device of one of them fails, by its numbers or by an error, neither uses."""
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        root = pathlib.Path(__file__).resolve().parents[2]
        options = dict(cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        commands = [[sys.executable, "-c", AGREE, address, str(i)] for i in range(2)]
        processes = [subprocess.Popen(command, **options) for command in commands]
        outputs = [process.communicate(timeout=240) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        for out, errors in outputs:
            one_is_wrong = "value second, forward second, tangent second, backward blockwise"
            assert [line for line in out.splitlines() if line.startswith("value")] == [
                "value ours, forward ours, tangent ours, backward ours",
                one_is_wrong,
                one_is_wrong,
            ]
            for i in range(2):
                named = [line for line in errors.splitlines() if f"(in process {i}: " in line]
                assert any("ours" in line and "error" in line for line in named)
                assert any("second" in line and "RuntimeError: no such instruction" in line for line in named)


AGREE = """
import logging, sys
import jax
from rcm_jax.kernels import accuracy, choice
from rcm_jax.parallel import distributed
from tests.kernels.spoiled import IMPLEMENTATIONS, PASSES, REFERENCE, off, raising, spoiled

address, process = sys.argv[1], int(sys.argv[2])
distributed.initialize(address, 2, process)
logging.disable(logging.NOTSET)  # the second process speaks too
logging.basicConfig(level=logging.WARNING)
jax.config.update("jax_disable_most_optimizations", True)
choice.CANDIDATES["cpu"] = dict.fromkeys(PASSES, ("ours", "second"))
choice.cases = lambda tokens, masked: (accuracy.Case(12, 12),)
for head_size, wrong in ((4, None), (8, 0), (16, 1)):
    ours = spoiled(off, *PASSES) if process == wrong else REFERENCE
    second = spoiled(raising, "backward") if process == wrong else REFERENCE
    IMPLEMENTATIONS.update(ours=ours, second=second)
    print(", ".join(f"{name} {each}" for name, each in choice.settle(head_size, "float32").items()))
"""


NETWORKS = {
    "dit": (tiny.MODEL, tiny.SHAPE),
    "wan": (dataclasses.replace(wan.TINY, dtype="bfloat16"), (2, 4, 6, wan.TINY.in_dim)),
    "cosmos": (cosmos.TINY, (1, 4, 6, cosmos.TINY.in_channels)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_settles_all_that_its_calls_will_ask_for(monkeypatch, name):
    model, shape = NETWORKS[name]
    monkeypatch.setattr(choice, "_settled", {})
    one = zeros(Predictor(model), shape).first
    make_network(Predictor(dataclasses.replace(model, attention="reference")), one)
    assert not choice._settled
    network = make_network(Predictor(model), one)
    (settled,) = choice._settled
    params = jax.eval_shape(network.make_params, jax.random.key(0))
    jax.eval_shape(lambda params, x: network.F(params, x, jnp.ones(1), one["cond"]), params, one["x0"])
    assert [*choice._settled] == [settled]
