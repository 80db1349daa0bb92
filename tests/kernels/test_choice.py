"""What flash_attention takes, which implementation it chooses, and what it logs of that."""

import logging

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.kernels import attention, bench
from rcm_jax.kernels.attention import flash_attention


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
        with pytest.raises(ValueError, match=r"'cudnn'.*'auto', 'reference', 'blockwise', 'triton', 'pallas_tpu'"):
            flash_attention(x, x, x, implementation="cudnn")

    @pytest.mark.parametrize(("backend", "name"), [("cpu", "blockwise"), ("tpu", "pallas_tpu")])
    def test_auto(self, backend, name, monkeypatch):
        monkeypatch.setitem(attention.FASTEST, "tpu", "pallas_tpu")
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        assert attention.resolve("auto") == name


class TestLoggedChoice:
    @pytest.fixture
    def logged(self, caplog, monkeypatch):
        """What flash_attention logs on a backend when it is called twice for each of some implementations."""

        def run(backend, *implementations):
            caplog.clear()
            monkeypatch.setattr(jax, "default_backend", lambda: backend)
            x = jnp.ones((1, 8, 2, 4))
            for name in implementations * 2:
                flash_attention(x, x, x, implementation=name)
            assert all((record.levelname == "WARNING") == ("ask for" in record.message) for record in caplog.records)
            return caplog.messages

        caplog.set_level(logging.INFO, attention.__name__)
        attention._log_choice.cache_clear()
        yield run
        attention._log_choice.cache_clear()

    def test_once_for_each_backend_and_name(self, logged):
        blockwise = 'attention on cpu: "blockwise" for implementation="auto"'
        reference = 'attention on cpu: "reference" for implementation="reference"'
        assert logged("cpu", "auto", "reference") == [blockwise, reference]
        assert logged("cpu", "auto", "reference") == []
        assert len(logged("gpu", "auto")) == 1

    @pytest.mark.parametrize(("backend", "kernel"), [("gpu", "triton"), ("tpu", "pallas_tpu")])
    def test_how_to_ask_for_a_kernel(self, logged, backend, kernel, monkeypatch):
        (message,) = logged(backend, "auto")
        assert message.startswith(f'attention on {backend}: "blockwise" for implementation="auto"; ')
        assert f'implementation="{kernel}" (in a config model.attention="{kernel}")' in message
        (message,) = logged(backend, "reference")  # asked for: there is nothing to tell
        assert message == f'attention on {backend}: "reference" for implementation="reference"'
        attention._log_choice.cache_clear()
        monkeypatch.setitem(attention.IMPLEMENTATIONS, kernel, attention.IMPLEMENTATIONS["reference"])
        monkeypatch.setitem(attention.FASTEST, backend, kernel)
        assert logged(backend, "auto") == [f'attention on {backend}: "{kernel}" for implementation="auto"']

    def test_every_backend_with_kernels_is_one_that_auto_may_learn(self):
        assert set(attention.FASTEST) <= set(attention.KERNELS)
        assert set(attention.KERNELS.values()) == set(bench.FUSED) <= set(attention.choices())
