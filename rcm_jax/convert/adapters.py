"""Files of adapters (LoRA), as diffusers, PEFT and ComfyUI name them, and adapters as rcm_jax.models.adapters has them.

There A is [r, in] and B [out, r], of every module by itself, and the adapter counts alpha/r times, r being its rank.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rcm_jax import convert
from rcm_jax.convert import table
from rcm_jax.convert.files import only_checkpoint, open_tensors, read_metadata, write_tensors
from rcm_jax.convert.values import check_finite
from rcm_jax.models.adapters import A, B, flat
from rcm_jax.util.files import as_path, brief, listed, parse_json, read_json, reading


class Layout(NamedTuple):
    """Names of one kind of file: those of modules in a layout of the network, behind a prefix."""

    modules: str
    prefix: str
    ends: tuple[str, str]  # of A and B
    stem: str  # of the file in a folder


LAYOUTS = {
    "diffusers": Layout("diffusers", "transformer.", (".lora_A.weight", ".lora_B.weight"), "pytorch_lora_weights"),
    "peft": Layout("diffusers", "base_model.model.", (".lora_A.weight", ".lora_B.weight"), "adapter_model"),
    "official": Layout("official", "diffusion_model.", (".lora_down.weight", ".lora_up.weight"), "adapter"),
}
ALPHA = ".alpha"  # a number for a module, in the files of "official"
DIFFUSERS_KEY = "lora_adapter_metadata"  # in the header of files of diffusers
PEFT_FILE = "adapter_config.json"
UNDERSCORED = "lora_unet_"  # before names with _ for every dot, as kohya's scripts write them
STRANGE = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "lora_bias")  # of PEFT; none is known here


class Adapter(NamedTuple):
    """A tree as rcm_jax.models.adapters has it, numpy arrays, and how often it counts."""

    tree: dict
    scale: float

    def astype(self, dtype) -> "Adapter":
        """With A and B in that dtype; ValueError for numbers too large for it."""
        leaves = {path: table.cast(leaf, jnp.dtype(dtype), path) for path, leaf in flat(self.tree).items()}
        return Adapter(unflatten_dict(leaves, sep="/"), self.scale)


def modules_of(kind: str, config, layout: str) -> dict[str, table.Entry]:
    """{module: entry of its kernel} of those that files of adapters can name: what is a plain matrix there."""
    return {
        name.removesuffix(".weight"): entry
        for name, entry in convert.entries(kind, config)[layout].items()
        if entry.rule.form is table.MATRIX and entry.rule.ours.endswith("/kernel") and not entry.rule.parts
    }


def to_tensors(kind: str, config, adapter: Adapter, layout: str) -> dict[str, np.ndarray]:
    """{name: tensor} of an adapter in one of LAYOUTS. ValueError for a kernel that has no name there."""
    modules, left, tensors = _modules(kind, config, layout), flat(adapter.tree), {}
    _, prefix, ends, _ = LAYOUTS[layout]
    for module, (rule, layer, _) in modules.items():
        path = rule.ours.removesuffix("/kernel")
        if f"{path}/{A}" not in left:
            continue
        both = [np.asarray(left[f"{path}/{name}"]) for name in (A, B)]
        both = both if layer is None else [array[layer] for array in both]
        tensors |= {f"{prefix}{module}{end}": array.T for end, array in zip(ends, both, strict=True)}
        if layout == "official":
            tensors[f"{prefix}{module}{ALPHA}"] = np.asarray(adapter.scale * both[0].shape[-1], np.float32)
    named = {entry.rule.ours.removesuffix("/kernel") for entry in modules.values()}
    if lost := sorted({path.rpartition("/")[0] for path in left} - named):
        raise ValueError(
            f"files of adapters have no name for {', '.join(lost)}: export merged weights, or leave it out of "
            "adapter.targets"
        )
    return tensors


def _modules(kind: str, config, layout: str) -> dict[str, table.Entry]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} of adapters is none of {', '.join(LAYOUTS)}")
    return modules_of(kind, config, LAYOUTS[layout].modules)


def write(folder, kind: str, config, adapter: Adapter, layout: str, **options) -> list[str]:
    """Writes an adapter into a new folder, whole or not at all; names of the files. options: of write_tensors."""
    tensors = to_tensors(kind, config, adapter, layout)
    metadata, extra = {"format": "pt"}, {}
    ranks = {leaf.shape[-1] for path, leaf in flat(adapter.tree).items() if path.endswith(A)}
    if layout != "official":
        if len(ranks) > 1:
            raise ValueError(f"ranks {sorted(ranks)}: the layout {layout!r} has one rank; take 'official'")
        (rank,) = ranks
        modules = sorted({name.removeprefix(LAYOUTS[layout].prefix).rpartition(".lora_")[0] for name in tensors})
        settings = {"r": rank, "lora_alpha": _number(adapter.scale * rank), "target_modules": modules}
        if layout == "diffusers":
            metadata[DIFFUSERS_KEY] = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        else:
            extra[PEFT_FILE] = json.dumps({"peft_type": "LORA", "base_model_name_or_path": None} | settings, indent=2)
    return write_tensors(folder, tensors, stem=LAYOUTS[layout].stem, metadata=metadata, extra_files=extra, **options)


def _number(value: float) -> float | int:
    """As an int where it is one: PEFT wants that."""
    return int(value) if value == int(value) else value


def read(path, kind: str, config) -> Adapter:
    """The adapter in a file, or in a folder of PEFT, in any of LAYOUTS or under kohya's names.

    Modules of one of our arrays are stacked: a rank below the largest, or a layer without adapter, gets zeros.

    Raises:
      ValueError: that lists tensors which are of no kernel of the network, or of another shape, and A without B.
    """
    tensors, alpha = open_tensors(path), _alpha_of(path)
    known, ends = _known(kind, config), {end: i for _, _, pair, _ in LAYOUTS.values() for i, end in enumerate(pair)}
    found, wrong = {}, []
    for name, tensor in tensors.items():
        end = next((end for end in (*ends, ALPHA) if name.endswith(end)), "")
        entry = known.get(name.removesuffix(end)) if end else None
        if entry is None:
            wrong.append(f"{brief(name)} is no adapter of a kernel of this {kind}")
            continue
        parts = found.setdefault((entry.rule.ours, entry.layer), {"entry": entry, "name": name.removesuffix(end)})
        parts[ALPHA if end == ALPHA else (A, B)[ends[end]]] = tensor
    wrong += [problem for parts in found.values() if (problem := _problem(parts))]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of {len(tensors)} tensors do not fit: {listed(wrong, 10, '; ')}")
    return stacked(found, convert.shapes_of(kind, config), alpha)


def _known(kind: str, config) -> dict[str, table.Entry]:
    """{name of a module before A's or B's end: entry}, in every way that files have."""
    known = {}
    for layout in convert.MODELS[kind].layouts(config):
        for module, entry in modules_of(kind, config, layout).items():
            prefixes = {layout.prefix for layout in LAYOUTS.values()} | {""}
            known |= {f"{prefix}{module}": entry for prefix in prefixes}
            known[UNDERSCORED + module.replace(".", "_")] = entry
    return known


def _problem(parts: Mapping) -> str:
    """What is wrong with A, B and alpha of a module; "" if nothing is."""
    name, (out, into) = brief(parts["name"]), parts["entry"].shape
    if not {A, B} <= parts.keys():
        return f"{name} has no {'B' if A in parts else 'A'}"
    down, up = (tuple(parts[part].shape) for part in (A, B))
    if len(down) != 2 or down[0] < 1 or down[1] != into or up != (out, down[0]):
        return f"{name} has A {brief(list(down))} and B {brief(list(up))}, which must be [r, {into}] and [{out}, r]"
    if any(np.dtype(parts[part].dtype) not in table.FLOATS for part in (A, B)):
        return f"{name} has dtypes {parts[A].dtype} and {parts[B].dtype}, which must be floats"
    if ALPHA in parts and math.prod(parts[ALPHA].shape) != 1:
        return f"{name} has an alpha of shape {brief(list(parts[ALPHA].shape))}"
    return ""


def stacked(found: Mapping, shapes: Mapping, alpha: float | None = None) -> Adapter:
    """{(our kernel, layer or None): {"name", A [r, in], B [out, r], perhaps ALPHA}} as one adapter.

    shapes: of our parameters. alpha: of kernels that have none of their own; None: their rank.
    """
    scales = {key: _scale(parts, alpha) for key, parts in found.items()}
    scale = next(iter(scales.values()))
    if not all(0 < abs(one) < math.inf for one in scales.values()):
        raise ValueError(f"alphas {brief(sorted(set(scales.values())))} times a rank: each must be a number, and not 0")
    paths: dict[str, list] = {}
    for key in found:
        paths.setdefault(key[0], []).append(key)
    leaves: dict[str, Any] = {}
    for ours, keys in paths.items():
        *layers, fan_in, fan_out = shapes[ours]
        rank = max(found[key][A].shape[0] for key in keys)
        dtype = jnp.result_type(*{np.dtype(found[key][part].dtype) for key in keys for part in (A, B)})
        down, up = np.zeros((*layers, fan_in, rank), dtype), np.zeros((*layers, rank, fan_out), dtype)
        for key in keys:
            parts, place = found[key], () if key[1] is None else (key[1],)
            both = [np.asarray(parts[part]) for part in (A, B)]
            for array in both:
                check_finite(parts["name"], array)
            own = both[0].shape[0]
            down[(*place, slice(None), slice(own))] = both[0].T
            up[(*place, slice(own))] = both[1].T if scales[key] == scale else both[1].T * (scales[key] / scale)
        path = ours.removesuffix("/kernel")
        leaves |= {f"{path}/{A}": down, f"{path}/{B}": up}
    return Adapter(unflatten_dict(leaves, sep="/"), scale)


def _scale(parts: Mapping, alpha: float | None) -> float:
    rank = parts[A].shape[0]
    own = float(np.asarray(parts[ALPHA]).reshape(())) if ALPHA in parts else alpha
    return 1.0 if own is None else own / rank


def _alpha_of(path) -> float | None:
    """What adapter_config.json beside it, or the header, says of alpha; None: nothing. ValueError for what is not
    known here."""
    place = as_path(path)
    place = only_checkpoint(place) if place.is_dir() else place
    settings = {}
    if (place.parent / PEFT_FILE).exists():
        settings = read_json(place.parent / PEFT_FILE)
    elif place.suffix == ".safetensors" and DIFFUSERS_KEY in (metadata := read_metadata(place)):
        with reading(place, f"has a {DIFFUSERS_KEY} that cannot be read"):
            settings = parse_json(metadata[DIFFUSERS_KEY].encode())
            settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: the settings of the adapter are no keys and values")
    if strange := [key for key in STRANGE if settings.get(key)]:
        raise ValueError(f"{path}: {', '.join(strange)} of PEFT is not known here: merge the adapter with PEFT")
    alpha = settings.get("lora_alpha")
    if alpha is not None and (type(alpha) not in (int, float) or not np.isfinite(alpha)):
        raise ValueError(f"{path}: lora_alpha is {brief(alpha)}, which must be a number")
    return None if alpha is None else float(alpha)
