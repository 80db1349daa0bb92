"""What the scripts of this folder share: the classes of other codes, and how their numbers are kept.

They need torch, diffusers and transformers, which the project does not: see README.md for the versions.
"""

import importlib
import json
import pathlib
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent


def diffsynth(name: str):
    """The module diffsynth.models.NAME, which has the official code of Wan under the official names.

    The package itself is not imported: it wants much more than these files do.
    """
    if "official" not in sys.modules:
        (place,) = [p for p in map(pathlib.Path, sys.path) if (p / "diffsynth/models").is_dir()]
        package = types.ModuleType("official")
        package.__path__ = [str(place / "diffsynth/models")]
        sys.modules["official"] = package
        for stub in ("torchvision", "torchvision.transforms"):  # of which nothing that we call is used
            sys.modules.setdefault(stub, types.ModuleType(stub))
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    return importlib.import_module(f"official.{name}")


def drawn(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module, for evaluation, with parameters of which none is zero; scales of norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            around_1 = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            parameter.copy_(noise + 1 if around_1 else noise)
    return module.eval().requires_grad_(False)


def normal(*shape: int, seed: int) -> torch.Tensor:
    """float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep(folder: str, name: str, config: dict, weights: dict[str, dict], arrays: dict) -> None:
    """Writes NAME.config.json, NAME.npz and, for each layout ("": official), NAME.LAYOUT.safetensors."""
    place = HERE / folder
    place.mkdir(exist_ok=True)
    (place / f"{name}.config.json").write_text(json.dumps(config, indent=1) + "\n")
    np.savez_compressed(place / f"{name}.npz", **{key: np.asarray(value) for key, value in arrays.items()})
    for layout, tensors in weights.items():
        tensors = {key: value.detach().float().contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, place / ".".join(filter(None, (name, layout, "safetensors"))))


def keep_index(name: str, shapes: dict[str, torch.Tensor], note: str, config: dict) -> None:
    """Writes checkpoint_index/NAME.json, {tensor: shape} of a state dict on the meta device, and its line in index."""
    folder = HERE / "checkpoint_index"
    lines = [f" {json.dumps(key)}: {json.dumps(list(value.shape))}" for key, value in shapes.items()]
    (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    index = json.loads((folder / "index.json").read_text())
    numbers = sum(value.numel() for value in shapes.values())
    index[name] = {"params": numbers, "tensors": len(shapes), "buffers": [], "note": note, "config": config}
    (folder / "index.json").write_text(json.dumps(index, indent=1))
