"""Published tars become items and examples, read without torch; what is wrong in them is named by tar and sample."""

import io
import json
import re
import tarfile
import tempfile

import ml_dtypes
import numpy as np
import pytest

from configs import wan_1_3b
from rcm_jax.build.shards import shards
from rcm_jax.util.config import revise
from tests.torch_pickle import Call, Name, save, tensor

RUN = wan_1_3b.tiny(wan_1_3b.EXPERIMENT)  # x0 [2, 4, 6, 4], text [6, 8]
KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float64": "DoubleStorage"}


def torch_file(array) -> bytes:
    """An array as torch.save writes a tensor."""
    array = np.ascontiguousarray(array)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        content = tensor("0", array.shape, strides, array.size, kind=KINDS[array.dtype.name])
        save(file.name, content, {"0": array})
        return file.read()


def normal(*shape, key=0, dtype="float32"):
    return np.random.default_rng(key).normal(size=shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def sample(name, *, latent=None, embedding=None, prompt="a cat", key=0):
    """{file: bytes} of a sample; latent and embedding: other arrays or bytes."""
    latent = normal(4, 2, 4, 6, key=key, dtype="bfloat16") if latent is None else latent
    embedding = normal(3, 8, key=key + 1, dtype="bfloat16") if embedding is None else embedding
    parts = {"latent.pt": latent, "embed.pt": embedding, "prompt.txt": prompt.encode()}
    return {f"{name}.{kind}": part if isinstance(part, bytes) else torch_file(part) for kind, part in parts.items()}


def write(path, *samples, mode="w"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in (item for files in samples for item in files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two tars of two samples, the second with names that the first has too; and what is no tar."""
    write(tmp_path / "set/b.tar", sample("000", key=20), sample("x/001", key=30, prompt=" ein Hund\u00e9\n"))
    write(tmp_path / "set/a.tar", sample("001"), sample("000", key=10, prompt="a dog"))
    (tmp_path / "set/README.md").write_text("words")
    return tmp_path / "set"


def test_items_are_in_the_order_of_tars_and_samples(folder):
    source = shards(RUN, folder)
    names = ["a.tar/001", "a.tar/000", "b.tar/000", "b.tar/x/001"]
    assert [item.key for item in source.items] == names
    assert [item.prompt for item in source.items] == ["a cat", "a dog", "a cat", "ein Hund\u00e9"]
    assert {item.shape for item in source.items} == {(2, 4, 6, 4)} and source.brings_text and source.batch == 1
    assert source.items[3].origin == {"tar": "b.tar", "sample": "x/001"}
    assert [item.key for item in shards(RUN, folder / "b*.tar").items] == names[2:]
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    assert (
        source.settings
        == json.loads(json.dumps(source.settings))
        == {"kind": "shards", "tars": sizes, "text_length": 6}
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("leading", [(), (1,)])
def test_an_example_is_what_the_tar_holds(tmp_path, dtype, leading):
    latents = [normal(*leading, 4, 2, 4, 6, key=key, dtype=dtype) for key in range(2)]
    embeddings = [normal(*leading, length, 8, key=length, dtype=dtype) for length in (3, 6)]
    made = [sample(str(i), latent=latents[i], embedding=embeddings[i]) for i in range(2)]
    made[0] |= {"0.json": b"{}", "0.latent.pth": b"other"}
    write(tmp_path / "set/a.tar", *made)
    source = shards(RUN, tmp_path / "set")
    assert len(source.items) == 2
    for i, item in enumerate(source.items):
        (example,) = source.make([item], [source.prepare(item)], None)
        x0 = latents[i].reshape(4, 2, 4, 6).transpose(1, 2, 3, 0)
        text = np.concatenate([embeddings[i].reshape(-1, 8), np.zeros((6, 8), embeddings[i].dtype)])[:6]
        assert sorted(example) == ["text", "x0"] and example["x0"].flags.c_contiguous
        np.testing.assert_array_equal(example["x0"], x0, strict=True)
        np.testing.assert_array_equal(example["text"], text, strict=True)


EVIL = Call(Name("builtins", "eval"), ("1",))


def evil() -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        save(file.name, EVIL)
        return file.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(latent=normal(3, 2, 4, 6)), r"a\.tar: sample 007: latents must be \[4, t, h, w\], got \[3, 2, 4, 6\]"),
        (dict(latent=normal(2, 4, 2, 4, 6)), r"latents must be \[4, t, h, w\], got \[2, 4, 2, 4, 6\]"),
        (dict(latent=normal(4, 0, 4, 6)), r"latents must be .*, got \[4, 0, 4, 6\]"),
        (
            dict(latent=normal(4, 3, 4, 6, dtype="bfloat16")),
            r"x0 of sample 007 is bfloat16 \[3, 4, 6, 4\], that of .* first",
        ),
        (dict(latent=normal(4, 2, 4, 6)), r"x0 of sample 007 is float32 \[2, 4, 6, 4\], that of the first .* bfloat16"),
        (dict(latent=normal(4, 2, 4, 6, dtype="float64")), r"007\.latent\.pt is float64, not one of float32, float16"),
        (
            dict(embedding=normal(7, 8)),
            r"007: the embedding must be \[at most 6 .media\.text_length., 8\], got \[7",
        ),
        (dict(embedding=normal(3, 9)), r"the embedding must be .*got \[3, 9\]"),
        (dict(embedding=normal(3, 8)), r"text of sample 007 is float32 \[6, 8\], that of the first sample is bfloat16"),
        (dict(latent=b"PK\3\4 no"), r"a\.tar, 007\.latent\.pt .7 bytes. cannot be read: the zip is truncated"),
        (dict(embedding=b"no"), r"a\.tar, 007\.embed\.pt .2 bytes. cannot be read: it is no zip"),
        (dict(latent=evil()), r"a\.tar, 007\.latent\.pt is no plain state dict: .*asks for 'builtins\.eval'.*executed"),
    ],
)
def test_bad_tensors_are_refused_by_tar_and_sample(tmp_path, changes, message):
    write(tmp_path / "set/a.tar", sample("000"), sample("007", **changes))
    source = shards(RUN, tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        source.prepare(source.items[1])
    if "first" not in message:  # and the first sample is read at once
        write(tmp_path / "set/a.tar", sample("007", **changes))
        with pytest.raises(ValueError, match=message):
            shards(RUN, tmp_path / "set")


def test_samples_that_lack_a_part_are_bad_and_those_that_come_twice_refused(tmp_path):
    whole = sample("000")

    def bad(*samples, **options):
        write(tmp_path / "set/a.tar", *samples, **options)
        found = shards(RUN, tmp_path / "set")
        assert [item.key for item in found.items] == ["a.tar/001"]
        ((key, error),) = found.bad.items()
        assert key == "a.tar/000"
        return error

    for kind in ("latent.pt", "embed.pt", "prompt.txt"):
        lacking = {name: content for name, content in whole.items() if not name.endswith(kind)}
        assert bad(lacking, sample("001")).endswith(f"a.tar: sample 000 has no 000.{kind}")
    assert "no 000.embed.pt and no 000.prompt.txt" in bad({"000.latent.pt": whole["000.latent.pt"]}, sample("001"))
    assert "a.tar: 000.prompt.txt is not in UTF-8" in bad(whole | {"000.prompt.txt": b"\xff\xff"}, sample("001"))
    assert "000.latent.pt .2 bytes. cannot be read".replace(".2 bytes.", "(2 bytes)") in bad(
        whole | {"000.latent.pt": b"no"}, sample("001")
    )
    write(tmp_path / "set/a.tar", whole, whole)
    with pytest.raises(ValueError, match=r"a\.tar has 000\.latent\.pt twice"):
        shards(RUN, tmp_path / "set")
    write(tmp_path / "set/a.tar", {"000.json": b"{}"})
    with pytest.raises(ValueError, match=r"the 1 tars hold no sample that can be used: there is no NAME\.latent\.pt"):
        shards(RUN, tmp_path / "set")


def test_of_a_tar_that_is_cut_anywhere_what_is_whole_is_taken(folder):
    path = folder / "a.tar"
    data, others = path.read_bytes(), len(shards(RUN, folder).items)
    with tarfile.open(path) as archive:
        ends = archive.getmembers()[-1]
    after = ends.offset_data + 512  # the last sample is whole, the zeros behind it are gone
    path.write_bytes(data[:after])
    assert len(shards(RUN, folder).items) == 4 and not shards(RUN, folder).bad
    for size in (0, 100, 600, len(data) // 3, ends.offset - 100, ends.offset, ends.offset + 512, after - 10):
        path.write_bytes(data[:size])
        found = shards(RUN, folder)
        assert len(found.items) < others + (size == after - 10) and found.bad
        assert re.search(r"a\.tar is truncated, damaged or no plain tar|a\.tar: sample 000 has no", str(found.bad))
    middle = bytearray(data)
    middle[ends.offset : ends.offset + 512] = b"x" * 512  # a header
    path.write_bytes(middle)
    assert f"no header at byte {ends.offset}): download it" in shards(RUN, folder).bad["a.tar"]


def test_what_is_no_plain_tar_is_refused(tmp_path):
    write(tmp_path / "set/a.tar", sample("000"), mode="w:gz")
    with pytest.raises(ValueError, match=r"a\.tar is truncated, damaged or no plain tar"):
        shards(RUN, tmp_path / "set")
    for place in ("none", "set/c*.tar"):
        with pytest.raises(ValueError, match="there is no "):
            shards(RUN, tmp_path / place)


def test_networks_that_take_more_than_text_are_refused(folder):
    model = revise(RUN.model, {"model_type": "i2v", "in_dim": 12})
    with pytest.raises(ValueError, match=r"this network takes y \[2, 4, 6, 8\], but this set has nothing"):
        shards(revise(RUN, {"model": model}), folder)
    with pytest.raises(ValueError, match="name a config with media"):
        shards(revise(RUN, {"media": None}), folder)
