"""What reads files, each with the files that it is given: {name: (strategy of the files, what reads them)}.

A strategy gives {name of a file: its bytes}; a reader is given the folder that they are in.
"""

import functools
import io
import json
import pathlib
import tempfile
import zipfile
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from configs import digits, wan_1_3b
from rcm_jax import convert
from rcm_jax.build import shards
from rcm_jax.convert.files import open_tensors, write_tensors
from rcm_jax.data import LatentsConfig, latents, records
from rcm_jax.run import workdir
from rcm_jax.train.metrics import read_metrics
from tests.build.test_shards import sample, write
from tests.convert.test_torch_file import OLD, OLD_STORAGES, old_file
from tests.fuzz.mutations import GOOD, ITEMS, JSON_WORDS, changed, changed_json, pickles
from tests.torch_pickle import module, old_stream, opcodes, pickled, save, snapshot_tensor

ARRAY = np.arange(6, dtype=np.float32)
RUN = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)


def made(write: Callable[[pathlib.Path], object]) -> dict[str, bytes]:
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(folder := pathlib.Path(name))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_changed(files: dict[str, bytes], how=changed) -> st.SearchStrategy[dict[str, bytes]]:
    """The files, of which one is changed."""
    return st.one_of([how(data).map(lambda new, name=name: files | {name: new}) for name, data in files.items()])


def read_tensors(name: str) -> Callable[[pathlib.Path], None]:
    def read(folder):
        for tensor in open_tensors(folder / name).values():
            np.asarray(tensor)

    return read


# --- weights

CONTENT = {"a": GOOD, "b": {"c": GOOD, 7: GOOD}, "step": 3, "list": [1.5, (None, "x")]}


def zipped(data: bytes) -> dict[str, bytes]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", ARRAY.tobytes())
    return {"m.pt": content.getvalue()}


def of_torch():
    data = made(lambda folder: save(folder / "m.pt", CONTENT))["m.pt"]
    words = (b"PK\1\2", b"PK\3\4", b"PK\5\6" + bytes(18), b"PK\6\6", data[:300], data[-300:])
    return st.one_of(pickles(pickled(CONTENT)).map(zipped), changed(data, words).map(lambda new: {"m.pt": new}))


def of_old_torch():
    data = made(lambda folder: old_file(folder / "m.pt", OLD, OLD_STORAGES))["m.pt"]
    whole = pickled(OLD)
    grammar = pickles(whole).map(lambda new: data.replace(whole, new))
    return st.one_of(grammar, changed(data, tuple(map(opcodes, ITEMS)))).map(lambda new: {"m.pt": new})


def of_nvlabs():
    inner = old_stream(ARRAY.reshape(2, 3))
    net = module({"x": snapshot_tensor(ARRAY.reshape(2, 3))}, None, {"layer": module({"y": snapshot_tensor(ARRAY)})})
    whole = pickled({"ema": net, "loss_fn": module()})
    with_stream = changed(inner, tuple(map(opcodes, ITEMS))).map(
        lambda stream: pickled({"ema": module({"x": snapshot_tensor(ARRAY.reshape(2, 3), stream)})})
    )
    return st.one_of(pickles(whole), with_stream).map(lambda data: {"m.pkl": data})


def with_header(text: bytes) -> dict[str, bytes]:
    return {"m.safetensors": len(text).to_bytes(8, "little") + text + bytes(64)}


def of_safetensors():
    tensors = {"a": ARRAY, "b.c": np.zeros((2, 1, 3), np.float16), "d": np.zeros(()), "e": np.zeros((0, 4))}
    tensors["rest"] = np.zeros(20, np.uint8)
    (data,) = made(lambda folder: write_tensors(folder / "out", tensors)).values()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return st.one_of(
        changed_json(header).map(with_header), changed(data, JSON_WORDS).map(lambda new: {"m.safetensors": new})
    )


def of_index():
    files = made(lambda folder: write_tensors(folder / "out", dict.fromkeys("abc", ARRAY), stem="m", shard_bytes=50))
    files = {pathlib.PurePath(name).name: data for name, data in files.items()}
    index = json.loads(files["m.safetensors.index.json"])
    text = changed_json(index).map(lambda new: files | {"m.safetensors.index.json": new})
    return st.one_of(text, text, one_changed(files))


# --- data


def of_latents():
    rng = np.random.default_rng(0)
    examples = [
        {"x0": rng.normal(size=(2, 2, 2, 3)).astype("f2"), "text": np.zeros((2, 3), "f4"), "label": np.int32(i)}
        for i in range(5)
    ]
    uncond = {"text": np.zeros((2, 3), "f4"), "label": np.int32(7)}
    files = made(lambda folder: latents.write(folder / "set", examples, uncond, shard_bytes=500))
    files = {pathlib.PurePath(name).name: data for name, data in files.items()}
    told = changed_json(json.loads(files["set.json"])).map(lambda new: files | {"set.json": new})
    return st.one_of(told, one_changed(files), one_changed({"uncond.safetensors": files["uncond.safetensors"]}).map(
        lambda new: files | new))  # fmt: skip


def read_latents(folder):
    dataset = latents.load(LatentsConfig(str(folder), (2, 2, 2, 3)))
    for rows in dataset.train.buckets:
        dataset.train[rows]


def of_records():
    record = records.encode({"x0": ARRAY, "text": np.zeros((2, 3), np.float32), "label": np.array(3, np.int32)})
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
    grammar = changed_json(header).map(lambda text: len(text).to_bytes(8, "little") + text + record[-52:])
    return st.one_of(changed(record, JSON_WORDS), grammar).map(lambda new: {"record": new})


def of_tars():
    files = made(lambda folder: write(folder / "a.tar", sample("001"), sample("002", key=9)))
    words = (b"ustar\x0000", b"0000000\0", b"7777777\0", b"\x80" + b"\xff" * 7, files["a.tar"][:512], bytes(1024))
    bad = pickles(pickled(GOOD)).map(
        lambda data: made(
            lambda folder: write(folder / "a.tar", sample("001"), sample("002", latent=zipped(data)["m.pt"]))
        )
    )
    return st.one_of(changed(files["a.tar"], words, 3).map(lambda new: {"a.tar": new}), bad)


def read_tars(folder):
    for found in shards._index(folder / "a.tar")[0]:  # `shards` also builds the network, which takes a second
        shards._example(RUN.media, found)


# --- texts


def of_configs():
    configs = [
        json.loads(workdir.as_json(config)) for config in (digits.EXPERIMENT, RUN, digits.EXPERIMENT.pretraining)
    ]
    configs += [{"rcm": {"dmd": {"fake_score": 1}}}, {"pretrain": {"method": {"time": 1}}}]
    return st.one_of([changed_json(config) for config in configs]).map(lambda new: {"config.json": new})


def of_models():
    sizes = {"kind": "wan", "dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "text_dim": 8}
    return changed_json(sizes).map(lambda new: {"model.json": new})


def of_metrics():
    lines = b"".join(json.dumps({"step": i, "a": i / 3, "b": None}).encode() + b"\n" for i in range(5))
    rows = st.lists(changed_json({"step": 3, "a": 0.5}), max_size=5).map(b"\n".join)
    return st.one_of(changed(lines, JSON_WORDS), rows).map(lambda new: {"metrics.jsonl": new})


READERS = {
    "torch": (of_torch, read_tensors("m.pt")),
    "old_torch": (of_old_torch, read_tensors("m.pt")),
    "nvlabs": (of_nvlabs, read_tensors("m.pkl")),
    "safetensors": (of_safetensors, read_tensors("m.safetensors")),
    "index": (of_index, read_tensors("m.safetensors.index.json")),
    "latents": (of_latents, read_latents),
    "record": (of_records, lambda folder: records.decode((folder / "record").read_bytes(), folder / "record")),
    "tar": (of_tars, read_tars),
    "config": (of_configs, workdir.read),
    "model": (of_models, lambda folder: convert.named(str(folder / "model.json"))),
    "metrics": (of_metrics, read_metrics),
}
strategies = functools.cache(lambda name: READERS[name][0]())
