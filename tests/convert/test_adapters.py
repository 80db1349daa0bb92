"""Files of adapters: every bit there and back, under the names of diffusers, PEFT, ComfyUI and kohya."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rcm_jax import convert
from rcm_jax.convert import adapters, extract
from rcm_jax.convert.adapters import Adapter
from rcm_jax.models.adapters import AdapterConfig, flat
from tests import adapters as ours
from tests import cosmos, tiny, wan

MODELS = {"wan": wan.TINY, "cosmos": cosmos.TINY}


def same(a: Adapter, b: Adapter) -> None:
    """All bits, dtypes and the scale."""
    first, second = flat(a.tree), flat(b.tree)
    assert first.keys() == second.keys() and a.scale == b.scale
    for path, leaf in first.items():
        assert leaf.dtype == second[path].dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), np.asarray(second[path], np.float64))


@pytest.mark.parametrize("layout", adapters.LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_keeps_every_bit(tmp_path, kind, layout, dtype):
    config = AdapterConfig(rank=3, alpha=7.0)
    adapter = Adapter(ours.drawn(MODELS[kind], config), config.scale).astype(dtype)
    names = adapters.write(tmp_path / "out", kind, MODELS[kind], adapter, layout)
    same(adapters.read(tmp_path / "out" / names[0], kind, MODELS[kind]), adapter)
    same(adapters.read(tmp_path / "out", kind, MODELS[kind]), adapter)


def test_names_and_shapes_are_those_that_others_read(tmp_path):
    config = AdapterConfig(rank=3, alpha=6.0, targets=("blocks/self_attention/q", "blocks/mlp/up"))
    adapter = Adapter(ours.drawn(wan.TINY, config), config.scale)
    found = {}
    for layout in adapters.LAYOUTS:
        names = adapters.write(tmp_path / layout, "wan", wan.TINY, adapter, layout)
        found[layout] = {name: x.shape for name, x in load_file(tmp_path / layout / names[0]).items()}
        assert len(found[layout]) == (12 if layout == "official" else 8)
    assert found["diffusers"]["transformer.blocks.1.attn1.to_q.lora_A.weight"] == (3, 24)
    assert found["diffusers"]["transformer.blocks.0.ffn.net.0.proj.lora_B.weight"] == (32, 3)
    assert found["peft"]["base_model.model.blocks.1.attn1.to_q.lora_B.weight"] == (24, 3)
    assert found["official"]["diffusion_model.blocks.1.self_attn.q.lora_down.weight"] == (3, 24)
    assert found["official"]["diffusion_model.blocks.0.ffn.0.lora_up.weight"] == (32, 3)
    assert found["official"]["diffusion_model.blocks.0.ffn.0.alpha"] == ()
    with safe_open(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors", "np") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["transformer.r"] == 3 and settings["transformer.lora_alpha"] == 6
    assert "blocks.1.attn1.to_q" in settings["transformer.target_modules"]
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 3, 6)
    down = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        down["base_model.model.blocks.1.attn1.to_q.lora_A.weight"].T,
        adapter.tree["blocks"]["self_attention"]["q"]["lora_a"][1],
    )


def test_files_with_ranks_alphas_and_layers_of_their_own_are_read_as_what_they_mean(tmp_path):
    rng = np.random.default_rng(0)

    def pair(stem, rank, out, into, alpha=None):
        tensors = {f"{stem}.lora_down.weight": rng.normal(size=(rank, into)).astype(np.float32)}
        tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
        return tensors | ({} if alpha is None else {f"{stem}.alpha": np.float32(alpha)[None]})

    tensors = pair("lora_unet_blocks_0_self_attn_q", 2, 24, 24, 4.0) | pair("lora_unet_blocks_1_self_attn_q", 3, 24, 24)
    tensors |= pair("lora_unet_blocks_1_ffn_2", 1, 24, 32, 0.5)
    save_file(tensors, tmp_path / "kohya.safetensors")
    tree, scale = adapters.read(tmp_path / "kohya.safetensors", "wan", wan.TINY)

    def product(path, layer):
        module = flat(tree)[f"{path}/lora_a"], flat(tree)[f"{path}/lora_b"]
        return scale * module[0][layer] @ module[1][layer]

    def meant(stem, scale):
        return scale * (tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]).T

    q, down = "blocks/self_attention/q", "blocks/mlp/down"
    assert tiny.relative(product(q, 0), meant("lora_unet_blocks_0_self_attn_q", 2.0)) < 1e-6
    assert tiny.relative(product(q, 1), meant("lora_unet_blocks_1_self_attn_q", 1.0)) < 1e-6
    assert tiny.relative(product(down, 1), meant("lora_unet_blocks_1_ffn_2", 0.5)) < 1e-6
    assert not product(down, 0).any() and tree.keys() == {"blocks"}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | {"transformer.blocks.0.attn1.to_q.lora_B.bias": np.ones(24, np.float32)}, "lora_B.bias is no"),
        (
            lambda t: t | {"text_encoder.q.lora_A.weight": np.ones((3, 8), np.float32)},
            "text_encoder.q.lora_A",
        ),
        (lambda t: dict(list(t.items())[1:]), "has no A"),
        (
            lambda t: {n: x[:, :-1] if "lora_A" in n else x for n, x in t.items()},
            r"must be \[r, 24\]",
        ),
        (lambda t: {n: x.astype(np.int32) for n, x in t.items()}, "must be floats"),
        (lambda t: {n: x * np.nan for n, x in t.items()}, "are NaN or inf"),
    ],
)
def test_what_is_no_adapter_of_the_network_is_told(tmp_path, change, words):
    config = AdapterConfig(rank=3, targets=("blocks/self_attention/q",))
    tensors = adapters.to_tensors("wan", wan.TINY, Adapter(ours.drawn(wan.TINY, config), 1.0), "diffusers")
    save_file({n: np.ascontiguousarray(x) for n, x in change(tensors).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words):
        adapters.read(tmp_path / "x.safetensors", "wan", wan.TINY)


def test_settings_of_peft_that_are_not_known_and_kernels_without_a_name_are_refused(tmp_path):
    config = AdapterConfig(rank=3, targets=("blocks/self_attention/q",))
    adapter = Adapter(ours.drawn(wan.TINY, config), 1.0)
    adapters.write(tmp_path / "a", "wan", wan.TINY, adapter, "peft")
    place = tmp_path / "a" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora of PEFT is not known here"):
        adapters.read(tmp_path / "a", "wan", wan.TINY)
    patch = Adapter(ours.drawn(wan.TINY, AdapterConfig(rank=3, targets=("patch_in",))), 1.0)
    with pytest.raises(ValueError, match=r"no name for patch_in: export merged weights"):
        adapters.write(tmp_path / "b", "wan", wan.TINY, patch, "diffusers")
    with pytest.raises(ValueError, match=r"'rcm' of adapters is none of diffusers, peft, official"):
        adapters.write(tmp_path / "b", "wan", wan.TINY, adapter, "rcm")
    assert not (tmp_path / "b").exists()


def extracted(rank: int, tuned, base) -> tuple[Adapter, list]:
    modules = adapters.modules_of("wan", wan.TINY, "diffusers")
    tensors = [convert.to_reference("wan", params, wan.TINY, "diffusers") for params in (base, tuned)]
    found = list(extract.extract(*tensors, modules, rank, lambda path: path.startswith("blocks/")))
    parts = {(x.entry.rule.ours, x.entry.layer): {"name": x.module, "lora_a": x.down, "lora_b": x.up} for x in found}
    return adapters.stacked(parts, convert.shapes_of("wan", wan.TINY)), found


def test_an_adapter_of_full_rank_gives_back_the_network_and_one_of_less_the_nearest():
    base, change = wan.random_params(), wan.random_params(key=1)
    whole, _ = extracted(32, change, base)
    again = flat(ours.merged(base, whole.tree, whole.scale))
    for path, leaf in flat(change).items():
        if path.startswith("blocks/") and path.endswith("/kernel"):
            np.testing.assert_allclose(again[path], leaf, atol=2e-6)
    _, found = extracted(5, change, base)
    for one in found[:4]:
        matrix = np.asarray(flat(change)[one.entry.rule.ours] - flat(base)[one.entry.rule.ours])[one.entry.layer].T
        values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        assert one.left == pytest.approx(np.sqrt(np.sum(values[5:] ** 2)), rel=1e-5)
        assert one.size == pytest.approx(np.sqrt(np.sum(values**2)), rel=1e-6)
        assert one.down.shape == (5, matrix.shape[1]) and one.up.shape == (matrix.shape[0], 5)


def test_large_matrices_take_the_randomised_method_which_finds_a_low_rank_and_nearly_the_best():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(1100, 6)) @ rng.normal(size=(6, 1200))
    assert min(low.shape) > extract.DENSE
    _, _, size, left = extract.nearest(low, 6)
    assert left < 1e-5 * size
    u, v = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (1100, 1200))
    values = 2.0 ** -np.arange(40)
    _, _, _, left = extract.nearest((u * values) @ v.T, 8)
    assert left == pytest.approx(np.sqrt(np.sum(values[8:] ** 2)), rel=1e-2)


def test_an_adapter_is_read_for_a_network_of_bfloat16_as_well(tmp_path):
    adapter = Adapter(ours.drawn(wan.TINY, AdapterConfig(rank=2)), 1.0).astype("bfloat16")
    adapters.write(tmp_path / "a", "wan", wan.TINY, adapter, "official")
    tree, _ = adapters.read(tmp_path / "a" / "adapter.safetensors", "wan", wan.TINY)
    assert {leaf.dtype for leaf in flat(tree).values()} == {jnp.dtype("bfloat16")}
