"""Files of torch.save without torch: what they hold, and that nothing in them is executed.

The pickles are made here from opcodes; one file was made by torch 2.13.
"""

import base64
import copy
import copyreg
import io
import os
import pathlib
import pickle
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from rcm_jax.convert import torch_file
from rcm_jax.convert.files import open_tensors
from rcm_jax.convert.torch_file import STORAGES, open_torch_file, read_torch_tensor
from tests.torch_pickle import ORDERED, REBUILD, Call, Name, Reference, opcodes, pickled, save, storage, tensor

BY_TORCH = (
    "c-o~_%WoS+7#~04IHpaU637D@0u*o{b^KhrZ4%o{Sz5NV$)*nzDAvZ_*cKbFKkv9DNRc9i1S<6a2&pGfk4PLja3uc#2at+5fP};$<-`q"
    "%8#A+xyR&(iCL^!ckNG{m-T8jAv$DsFkl&AXjUYOKip4_N&`Xmg6|3R;2f8Hoq6KcOxmN*&@?8Y5Y?L$|T*acH>sk?4jhY#_(kN*St#r"
    "Ox!~t-RE8q#`ePr%!ty->N@D{PrC|1ISCa&scpwQ43n^nD3z*@~T8iiZ20Ca^y`EG(R$xOAZfzN^jB;8Q)y!B%My7MkFCj$Pwhn$P`Ci"
    "KWY41qZr$!^)R2~Wr#*|iDB?o_CY;~07s=*yGR(PC9KAy^?g6<@{Ti9&y+M|NX4!SEaKr0m*&0So&ShNl%6WM$xHqo$Q$$U?WAiOgD5X"
    "qy{mq%jyFq{lEkLrJ~V)U&cn_HM#Si+B{na|(<xQ+2h0;rW)S;Ythn!W_Z5W%nk$NIz`CDGT`$hL;t1g&}d37z$Oa+A6BP1mm2$3*@J^"
    "vsan3IJ{<+JJBllG%Yu5aZh51C=g|LxM(zM7-AgXC8Jhu^Tioo0uqGJg&|4!#>Xul0YgfGG~-#))v^g^_^W0ZdYk7g<4M9f!sEd(MSXc"
    "TV4C`xvG_6=vI^uFpSE1bD<E?BP=MD77-2Y1!H8b&H>@=vSp;ulxS+tr<|@3E?;(J~vW8W<&_QPZU&_-ifVWrSGFyPRw1!F6G+dEgrfD"
    "uR47p7zfoTnx-Df4YX9Qr5^Opj}x=8cXpNks1YMriG{;p%Vp+Npq_T`;VU_pU**-bUER)_cGE>?QYz?um+Z^HW_M*ATYE^E#3tlaJY_u"
    "<|3d!!xcF}rV@5291;HV-cujb#-VTBS<jn4{Zwk0@38{_o$`sW?6MR~kX7M@p@BE~t97TwB&^SQ6tM#r7CNf*Q!&hQHiI!hN8Dew1k&S"
    "X{xHLBmNB&mBg0XXsUob&Y!1nErE^W`gfP54~uHOV!DUB%VEj0gH7lL*BCFMUFLc+|N=+gP(1GK1BW)>fmUCcNCSx5c>c6Yd;W@4Ar~1"
    "QY=sbe+RuOUN0tzX>|DdN$uHeb}f59yOsSTi*mu-ST2&Ie&l;YHx5yM{ITkvL0eQyc<|s$+MM1FT3KEzA&FB*S$+%MEoSPW{>!#;i0hv"
    "`%Jp|47nS~Q{o^}y=k>Iu(Vo&dURsdE=_8fDa8R8CyjV&SgJ}2q39?@K{qDla&iAj+mLTnrJW_td162K|uglju=hrBTJql1(lBqSSBtb"
    "t?>C;xBT9U-@W15MiV?tU;q*C#u5J@CcsZ=BqO{QXz<e5YwnvTQ-AudFOG<EsaKR<pGB0fUQrHh(v`?PO1!ClUs&yh~FeFGWfklP-#-}"
    "dArv2Ow+9Lby)9kBB_dF(;n&++_h<7saoPPjdFdpY>^F6795C)S>zJocdz8+BssX~$#fqbi@cPOLq>9J)?y+=;cP4v)Rs?Z76SSbJ>n*"
    "k7I4<PLW4V6l&RzXK~cb?x2GW4D~xloM<3)jke8(1V=m-~`)SXp{qgVFT~o+_SRJH?b21p3}RE-#MEe>zoekYz;oPOMH9W`ffd?b@?nz"
    "FPm@8{SUX5C42"
)


def arrays(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in open_torch_file(path).items()}


GOOD = tensor("0", (2, 3), (3, 1), 6)


@pytest.mark.smoke
def test_a_file_that_torch_made(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(zlib.decompress(base64.b85decode(BY_TORCH)))
    opened = open_tensors(path)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    base = np.arange(12).astype(ml_dtypes.bfloat16).reshape(3, 4)
    expected = {
        "model.weight": weight,
        "model.bias": np.float32([-1, 0.5]),
        "model.turned": base.T,
        "model.part": base[1:, ::2],
        "model.tied": weight,
        "model.half": np.float16([1.5, -2]),
        "model.count": np.array(7),
        "model.flags": np.array([True, False, True]),
        "model.empty": np.zeros((0, 3), np.float32),
        "parameter": np.float32([[2.25]]),
    }
    assert list(opened) == list(expected)
    for name, array in expected.items():
        assert (opened[name].shape, opened[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(np.asarray(opened[name]), array, strict=True)


def test_files_that_torch_makes_here(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5))
    module.tied = module[2]
    state = module.state_dict()
    base = torch.randn(5, 7).to(torch.bfloat16)
    state |= {"turned": base.T, "part": base[1:4, ::2], "wide": torch.randn(1, 3).expand(4, 3), "none": base[:, 7:]}
    kinds = [str(dtype) for dtype in STORAGES.values()]
    state |= {kind: torch.randint(0, 2, (3, 2)).to(getattr(torch, kind)) for kind in kinds}
    state["extra._extra_state"] = io.BytesIO(b"\x00\xff more")
    state["nothing._extra_state"] = io.BytesIO()
    content = {"net": state, "raw": dict(module.named_parameters()), "step": 3, "shape": torch.Size([2])}
    for protocol in (2, 3, 4, 5):
        torch.save(content, tmp_path / "m.pt", pickle_protocol=protocol)
        # torch's own reading, as raw bits where numpy lacks the dtype
        expected = torch.load(tmp_path / "m.pt", weights_only=False)
        flat = {f"{a}.{b}": t for a in ("net", "raw") for b, t in expected[a].items() if isinstance(t, torch.Tensor)}
        opened = open_torch_file(tmp_path / "m.pt")
        assert list(opened) == list(flat)
        for name, t in flat.items():
            assert opened[name].shape == tuple(t.shape) and str(opened[name].dtype) == str(t.dtype).split(".")[1]
            bits = t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.detach().numpy()
            np.testing.assert_array_equal(np.asarray(opened[name]).view(bits.dtype), bits, strict=True)
    old = {name: tensor for name, tensor in state.items() if not name.startswith("nothing")}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert {name: tensor.tolist() for name, tensor in arrays(tmp_path / "old.pt").items()} == {
        name: tensor.tolist() for name, tensor in old.items() if not name.endswith("_extra_state")
    }


@pytest.mark.parametrize("kind", STORAGES)
def test_every_storage_type(tmp_path, kind):
    array = np.array([0, 1, 1, 0, 1, 0]).astype(STORAGES[kind])
    path = save(tmp_path / "m.pth", {"x": tensor("0", (3, 2), (2, 1), 6, kind=kind)}, {"0": array})
    np.testing.assert_array_equal(arrays(path)["x"], array.reshape(3, 2), strict=True)


def test_files_of_older_torch_have_no_byteorder(tmp_path):
    assert list(arrays(save(tmp_path / "m.pt", {"x": GOOD}, byteorder=None))) == ["x"]


def test_names_nest_and_what_is_no_tensor_is_left_out(tmp_path):
    inner = Call(Name("collections", "OrderedDict"), (), {"_metadata": {"version": 1}, "items": [1]})
    filled = opcodes(inner) + b"(" + opcodes("c.d") + opcodes(GOOD) + b"u"
    content = {"a": filled, 7: {"x": GOOD}, "step": 3, "list": [GOOD], "none": None, "args": {None: 1}}
    assert list(arrays(save(tmp_path / "m.pt", content))) == ["a.c.d", "7.x"]


def test_an_ordered_dict_of_python_2_is_called_with_its_items(tmp_path):
    items = [["x", GOOD], ["y", 3]]
    assert list(arrays(save(tmp_path / "m.pt", Call(Name("collections", "OrderedDict"), (items,))))) == ["x"]
    with pytest.raises(ValueError, match="too many values to unpack"):
        open_torch_file(save(tmp_path / "m.pt", Call(Name("collections", "OrderedDict"), ([(1, 2, 3)],))))


def test_parameters_and_what_transformer_engine_leaves_in_state_dicts(tmp_path):
    encoded = Call(Name("_codecs", "encode"), ("\xff", "latin1"))
    extra = opcodes(Name("_io", "BytesIO")) + b")\x81" + opcodes((encoded, 0, None)) + b"b"  # NEWOBJ, BUILD
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (GOOD, True, ORDERED))
    content = {"x": parameter, "x._extra_state": extra, "y._extra_state": Call(Name("__builtin__", "bytes"), ())}
    assert list(arrays(save(tmp_path / "m.pt", content))) == ["x"]


@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2, 2), (3, 2), 1, [[1, 3], [4, 6]]),
        ((2, 2), (2, 1), 2, [[2, 3], [4, 5]]),
        ((), (), 5, 5),
        ((0, 3), (3, 1), 6, np.zeros((0, 3))),
        ((1, 2), (1 << 62, 1), 4, [[4, 5]]),
        ((2, 3), (0, 1), 3, [[3, 4, 5], [3, 4, 5]]),
    ],
)
def test_views_of_a_storage(tmp_path, size, stride, offset, expected):
    numel = 7 if size == (2, 2) and stride == (3, 2) else 6
    path = save(tmp_path / "m.pt", {"x": tensor("0", size, stride, numel, offset)}, {"0": np.arange(numel, dtype="f4")})
    np.testing.assert_array_equal(arrays(path)["x"], np.array(expected, np.float32), strict=True)


def test_only_the_bytes_of_a_view_are_read(tmp_path, monkeypatch):
    counts = []
    frombuffer = np.frombuffer
    monkeypatch.setattr(np, "frombuffer", lambda data, dtype: counts.append(len(data)) or frombuffer(data, dtype))
    content = {"all": tensor("0", (1000,), (1,), 1000), "two": tensor("0", (2, 2), (10, 1), 1000, 500)}
    opened = open_torch_file(save(tmp_path / "m.pt", content, {"0": np.arange(1000, dtype=np.float32)}))
    assert counts == [] and opened["all"].shape == (1000,)
    np.testing.assert_array_equal(np.asarray(opened["two"]), np.float32([[500, 501], [510, 511]]))
    assert counts == [12 * 4]


@pytest.mark.parametrize(
    ("view", "numbers"),
    [
        (tensor("0", (2, 3), (3, 1), 6, 1), r"shape \(2, 3\), strides \(3, 1\) and offset 1"),
        (tensor("0", (2, 3), (4, 1), 6), r"strides \(4, 1\)"),
        (tensor("0", (0, 3), (3, 1), 6, 7), "offset 7"),
        (tensor("0", (7,), (1,), 6), r"shape \(7,\)"),
        (tensor("0", (1 << 70,), (0,), 6), f"shape .{1 << 70},."),
        (tensor("0", (1 << 40, 1 << 40), (0, 0), 6), "strides .0, 0."),
        (tensor("0", (2,), (1, 1), 6), r"shape \(2,\), strides \(1, 1\)"),
        (tensor("0", (1,) * 65, (1,) * 65, 6), "strides"),
    ],
)
def test_a_view_that_leaves_its_storage_is_refused(tmp_path, view, numbers):
    path = save(tmp_path / "m.pt", {"x": view})
    with pytest.raises(ValueError, match=rf"m\.pt: 'x' with .*{numbers}.* does not lie inside its storage of 6 elem"):
        open_torch_file(path)


@pytest.mark.parametrize(
    "view",
    [
        tensor("0", (-2, 3), (3, 1), 6),
        tensor("0", (2, 3), (-3, 1), 6),
        tensor("0", (2, 3), (3, 1), 6, -1),
        tensor("0", (2.0,), (1,), 6),
        tensor("0", (True,), (1,), 6),
        tensor("0", "ab", (1, 1), 6),
        tensor("0", [2], (1,), 6),
        Call(REBUILD, ("no storage", 0, (1,), (1,), False, None)),
    ],
)
def test_numbers_that_are_no_shape_are_refused(tmp_path, view):
    with pytest.raises(ValueError, match="'x' is no storage with an offset, a shape and strides from 0 up"):
        open_torch_file(save(tmp_path / "m.pt", {"x": view}))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (storage("1", 6), "entry archive/data/1 is missing"),
        (storage("../data.pkl", 1), r"entry archive/data/\.\./data\.pkl is missing"),
        (storage("/etc/passwd", 1), "entry archive/data//etc/passwd is missing"),
        (storage("0", 7), "storage 0 has 24 bytes, 7 × float32 need 28"),
        (storage("0", 1 << 62), "storage 0 has 24 bytes"),
        (storage("0", 4, "LongStorage"), "storage 0 has 24 bytes, 4 × int64 need 32"),
        (storage("0", -1), "a reference is not"),
        (storage("0", 6.0), "a reference is not"),
        (storage(0, 6), "a reference is not"),
        (Reference(("module", Name("torch", "FloatStorage"), "0", "cpu", 6)), "a reference is not"),
        (Reference(("storage", "Float", "0", "cpu", 6)), "a reference is not"),
        (Reference("0"), "not enough values to unpack"),
        (storage("0", 6, "UntypedStorage"), "it asks for 'torch.UntypedStorage'"),
    ],
)
def test_storages_that_are_not_there_are_refused(tmp_path, reference, message):
    path = save(tmp_path / "m.pt", {"x": Call(REBUILD, (reference, 0, (1,), (1,), False, None))})
    with pytest.raises(ValueError, match=rf"m\.pt is no plain state dict: .*{message}"):
        open_torch_file(path)


class Reduced:
    """Pickles as a call of function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    """{name: (name that is refused, pickle)}: each makes the file `marker` where it is executed."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    system = Name("posix", "system")
    chain = Call(Name("builtins", "getattr"), (Call(Name("importlib", "import_module"), ("os",)), "system"))
    made = {
        "eval": ("builtins.eval", pickled(Call(Name("builtins", "eval"), (code,)))),
        "exec": ("builtins.exec", pickled(Call(Name("builtins", "exec"), (code,)))),
        "python 2": ("__builtin__.eval", pickled(Call(Name("__builtin__", "eval"), (code,)))),
        "in a state dict": ("posix.system", pickled({"x": GOOD, "y": [Call(system, (command,))]})),
        "getattr chain": ("builtins.getattr", pickled(Call(chain, (command,)))),
        "numpy": ("numpy._core.multiarray._reconstruct", pickle.dumps(np.arange(3))),
        "our module": (
            "rcm_jax.util.files.os.system",
            pickled(Call(Name("rcm_jax.util.files", "os.system"), (command,))),
        ),
        "dotted": ("torch._utils._rebuild_tensor_v2", pickled(Name("torch", "_utils._rebuild_tensor_v2"))),
        "dotted class": ("collections.OrderedDict.fromkeys", pickled(Name("collections", "OrderedDict.fromkeys"))),
        "torch.load": ("torch.load", pickled(Call(Name("torch", "load"), (str(marker),)))),
        "open": ("_io.open", pickled(Call(Name("_io", "open"), (str(marker), "w")))),
        "INST": ("posix.system", b"(" + opcodes(command) + b"iposix\nsystem\n."),
        "OBJ": ("posix.system", b"(" + opcodes(system) + opcodes(command) + b"o."),
        "NEWOBJ": ("subprocess.Popen", pickled(opcodes(Name("subprocess", "Popen")) + opcodes((command,)) + b"\x81")),
        "dotted at 4": (
            "os.path.os.system",
            b"\x80\x04\x8c\x07os.path\x8c\x09os.system\x93" + opcodes((command,)) + b"R.",
        ),
    }
    for protocol in range(6):
        made[f"os.system at {protocol}"] = "posix.system", pickle.dumps(Reduced(os.system, command), protocol)
        popen = "subprocess.Popen" if protocol > 2 else "commands.Popen"  # its name in Python 2
        made[f"Popen at {protocol}"] = popen, pickle.dumps(Reduced(subprocess.Popen, ["touch", str(marker)]), protocol)
    return made


@pytest.mark.smoke
@pytest.mark.parametrize("attack", attacks("marker"))
def test_a_pickle_that_calls_something_is_refused_by_name_and_not_executed(tmp_path, attack):
    marker = tmp_path / "marker"
    refused, data = attacks(marker)[attack]
    path = save(tmp_path / "m.pt", data)
    with pytest.raises(ValueError, match=rf"it asks for '{refused}'.*Nothing in it was executed; load it with torch"):
        open_torch_file(path)
    assert not marker.exists()


def test_the_attacks_would_work(tmp_path):
    """Else the test above shows nothing."""
    for name in ("eval", "getattr chain", "os.system at 0", "os.system at 4", "INST", "OBJ", "dotted at 4"):
        marker = tmp_path / name.replace(" ", "_")
        result = pickle.loads(attacks(marker)[name][1])
        if hasattr(result, "close"):
            result.close()
        assert marker.exists(), name


@pytest.mark.parametrize("name", torch_file.ALLOWED, ids=".".join)
@pytest.mark.parametrize(
    "state", [{"__new__": None, "x": 1}, (None, {"__new__": None, "__setstate__": None}), ({}, {})]
)
def test_what_a_file_can_name_it_cannot_change(tmp_path, name, state):
    function = torch_file.ALLOWED[name]
    before = dict(vars(function)) if isinstance(function, type) else function
    built = opcodes(Name(*name)) + opcodes(state) + b"b"
    try:
        open_torch_file(save(tmp_path / "m.pt", {"x": built, "y": GOOD}))
    except ValueError:
        assert isinstance(function, str)  # a string has no state
    assert (dict(vars(function)) if isinstance(function, type) else function) == before
    assert list(arrays(save(tmp_path / "good.pt", {"x": GOOD}))) == ["x"]


def test_a_checked_view_cannot_be_changed_by_its_state(tmp_path):
    for state in ({"size": (1 << 40,)}, (None, {"size": (1 << 40,)})):
        changed = opcodes(GOOD) + opcodes(state) + b"b"
        assert arrays(save(tmp_path / "m.pt", {"x": changed}))["x"].shape == (2, 3)


def test_extension_codes_are_refused_even_if_something_registered_them(tmp_path):
    marker = tmp_path / "marker"
    copyreg.add_extension("posix", "system", 0xC0)
    try:
        attack = b"\x82\xc0" + opcodes((f"touch {marker}",)) + b"R."
        pickle.loads(attack)  # and now it is in the cache, which asks nobody
        assert marker.exists()
        marker.unlink()
        with pytest.raises(ValueError, match=r"it uses the extension code 192.*Nothing in it was executed"):
            open_torch_file(save(tmp_path / "m.pt", attack))
    finally:
        copyreg.remove_extension("posix", "system", 0xC0)
        copyreg.clear_extension_cache()
    assert not marker.exists()


def test_a_memo_larger_than_the_pickle_is_refused(tmp_path):
    data = b"\x80\x02}r" + (1 << 31).to_bytes(4, "little") + b"."
    with pytest.raises(ValueError, match=f"it has 9 bytes and wants to memorise item {1 << 31}"):
        open_torch_file(save(tmp_path / "m.pt", data))


def test_dicts_that_hold_themselves_or_each_other_end(tmp_path):
    itself = b"\x80\x02}q\x01(" + opcodes("x") + opcodes(GOOD) + opcodes("y") + b"h\x01u."
    with pytest.raises(ValueError, match=r"m\.pt holds 'y' a second time"):
        open_torch_file(save(tmp_path / "m.pt", itself))
    doubled = b"".join(b"}(" + opcodes("a") + b"h%c" % i + opcodes("b") + b"h%cuq%c" % (i, i + 1) for i in range(60))
    with pytest.raises(ValueError, match="a second time"):
        open_torch_file(save(tmp_path / "m.pt", b"\x80\x02}q\x00" + doubled + b"."))
    deep = [b"\x80\x02" + (b"}" + opcodes("a")) * n + opcodes(GOOD) + b"s" * n + b"." for n in (1000, 5000)]
    assert list(open_torch_file(save(tmp_path / "m.pt", deep[0]))) == [".".join("a" * 1000)]
    with pytest.raises(ValueError, match=r"m\.pt: 'a\.a\..*' is too long for a name, or too deep") as caught:
        open_torch_file(save(tmp_path / "m.pt", deep[1]))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 1, "list": [GOOD]}, "holds not a single tensor in its dicts"),
        (GOOD, "holds no dict of tensors"),
        ({"a.b": GOOD, "a": {"b": GOOD}}, r"holds two tensors named 'a\.b'"),
        ({"a": {(1, 2): GOOD}}, "'a' has keys that are neither strings nor integers"),
    ],
)
def test_contents_without_clear_names_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"m\.pt:? {message}"):
        open_torch_file(save(tmp_path / "m.pt", content))


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "m.pth"
    pickle_alone = pickle.dumps({"a": 1}, 2)
    for data in (b"", pickle_alone, b"version https://git-lfs.github.com/spec/v1", b"\0" * 4096):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"m\.pth .{len(data)} bytes. cannot be read: it is no zip, .*use the safet"
        ):
            open_torch_file(path)
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")
    with pytest.raises(ValueError, match=r"it is no zip, and no old file of torch\.save"):
        open_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "x")
    with pytest.raises(ValueError, match=r"has one data\.pkl in a folder, this zip has 0"):
        open_torch_file(path)
    with pytest.raises(ValueError, match=r"written on a big-endian machine; load it with torch"):
        open_torch_file(save(path, {"x": GOOD}, byteorder=b"big"))
    with pytest.raises(ValueError, match="entry archive/byteorder is compressed or encrypted"):
        open_torch_file(save(path, {"x": GOOD}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(FileNotFoundError):
        open_torch_file(tmp_path / "none.pt")


def old_file(path, content, storages, order=None) -> pathlib.Path:
    """A file as torch.save made it before 1.6; storages {key: array}."""
    content = content if isinstance(content, bytes) else pickled(content)
    parts = [torch_file.MAGIC, pickled(1001), pickled({"little_endian": True}), content, pickled(order or [*storages])]
    for array in storages.values():
        parts += [len(array).to_bytes(8, "little"), array.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


OLD = {"x": tensor("b", (2, 3), (3, 1), 6, rest=(None,)), "y": tensor("a", (2,), (2,), 4, rest=(None,))}
OLD_STORAGES = {"a": np.arange(4, dtype=np.float32), "b": np.arange(6, dtype=np.float32)}


def test_files_of_before_torch_1_6(tmp_path):
    read = arrays(old_file(tmp_path / "m.pth", OLD, OLD_STORAGES))
    np.testing.assert_array_equal(read["x"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(read["y"], [0, 2])


def test_old_files_that_disagree_with_themselves_are_refused(tmp_path):
    path = old_file(tmp_path / "m.pth", OLD, OLD_STORAGES)
    data = path.read_bytes()
    for size in range(len(torch_file.MAGIC), len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"m\.pth is (no plain state dict|truncated)"):
            open_torch_file(path)
    for storages, order in (({"a": OLD_STORAGES["a"]}, None), (OLD_STORAGES, ["b", "a"]), (OLD_STORAGES, ["a", "a"])):
        with pytest.raises(ValueError, match=r"no plain state dict|truncated"):
            open_torch_file(old_file(path, OLD, storages, order))
    two = OLD | {"z": tensor("a", (2,), (1,), 2, rest=(None,))}
    with pytest.raises(ValueError, match="two storages of one name"):
        open_torch_file(old_file(path, two, OLD_STORAGES))


@pytest.mark.parametrize("attack", attacks("marker"))
def test_an_attack_in_an_old_file_is_refused_as_in_a_zip(tmp_path, attack):
    marker = tmp_path / "marker"
    refused, data = attacks(marker)[attack]
    with pytest.raises(ValueError, match=rf"it asks for '{refused}'.*Nothing in it was executed; load it with torch"):
        open_torch_file(old_file(tmp_path / "m.pt", data, {}))
    assert not marker.exists()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = save(tmp_path / "m.pt", {"x": GOOD})
    data = path.read_bytes()
    for size in (4, 30, 100, len(data) // 2, len(data) - 100, len(data) - 22, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"m\.pt .{size} bytes. cannot be read: the zip is truncated or damaged"):
            open_torch_file(path)


def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path):
    path = save(tmp_path / "m.pt", {"x": GOOD})
    opened = open_torch_file(path)
    data = path.read_bytes()
    end = data.index(np.arange(6, dtype=np.float32).tobytes()) + 20
    path.write_bytes(data[:end])
    with pytest.raises(ValueError, match="is truncated: archive/data/0 has 20 of 24 bytes"):
        np.asarray(opened["x"])
    path.write_bytes(b"\0" * len(data))
    with pytest.raises(ValueError, match="is damaged: no entry archive/data/0 at byte"):
        np.asarray(opened["x"])


def test_damaged_files_raise_nothing_but_value_errors(tmp_path):
    data = save(tmp_path / "m.pt", {"x": GOOD}).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        (tmp_path / "m.pt").write_bytes(damaged)
        try:
            arrays(tmp_path / "m.pt")
        except ValueError as error:
            refused += str(error).count("m.pt") > 0
    assert refused > 200


def test_a_tensor_by_itself_is_read_from_bytes(tmp_path):
    path = save(tmp_path / "m.pt", tensor("0", (2, 2), (3, 2), 7, 1), {"0": np.arange(7, dtype=np.float32)})
    np.testing.assert_array_equal(read_torch_tensor(path.read_bytes(), "a"), np.float32([[1, 3], [4, 6]]), strict=True)
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (GOOD, True, ORDERED))
    assert read_torch_tensor(save(path, parameter).read_bytes(), "a").shape == (2, 3)
    with pytest.raises(ValueError, match=r"m\.pt holds no dict of tensors"):
        open_torch_file(path)


@pytest.mark.parametrize("content", [{"x": GOOD}, [GOOD], 3, ORDERED, storage("0", 6)], ids=repr)
def test_bytes_that_hold_more_or_less_than_one_tensor_are_refused(tmp_path, content):
    data = save(tmp_path / "m.pt", content).read_bytes()
    with pytest.raises(ValueError, match=r"a\.tar, 7\.pt holds .*, not one tensor by itself"):
        read_torch_tensor(data, "a.tar, 7.pt")


@pytest.mark.parametrize("attack", attacks("marker"))
def test_an_attack_in_bytes_is_refused_as_in_a_file(tmp_path, attack):
    marker = tmp_path / "marker"
    refused, content = attacks(marker)[attack]
    data = save(tmp_path / "m.pt", content).read_bytes()
    with pytest.raises(ValueError, match=rf"^a is no plain state dict: .*it asks for '{refused}'.*Nothing in it was"):
        read_torch_tensor(data, "a")
    assert not marker.exists()


def test_damaged_bytes_raise_value_errors_that_name_them(tmp_path):
    data = save(tmp_path / "m.pt", GOOD).read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=rf"^a .{size} bytes. cannot be read: "):
            read_torch_tensor(data[:size], "a")
    with pytest.raises(ValueError, match=r"^a: 'the tensor' with shape .* does not lie inside its storage"):
        read_torch_tensor(save(tmp_path / "m.pt", tensor("0", (7,), (1,), 6)).read_bytes(), "a")


def deep(kind: str, depth: int) -> bytes:
    """A value inside so many others."""
    view = opcodes(REBUILD) + b"("
    return {
        "list": b"]" * depth + b"a" * (depth - 1),
        "tuple": b")" + b"\x85" * depth,
        "dict": (b"}" + opcodes("a")) * depth + b"N" + b"s" * depth,
        "ordered dict": (opcodes(ORDERED) + opcodes("a")) * depth + b"N" + b"s" * depth,
        "view": view * depth + b"NNNNNN" + b"tRNNNNN" * (depth - 1) + b"tR",
    }[kind]


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "ordered dict", "view"])
@pytest.mark.parametrize("place", ["a value", "a key", "in a set", "a shape", "a reference", "a name"])
def test_values_in_each_other_take_no_stack(tmp_path, kind, place):
    """Each ends a process that hashes, compares or prints them in C."""
    inner = deep(kind, 20_000)
    item = {
        "a value": opcodes("y") + inner,
        "a key": inner + b"N",
        "in a set": opcodes("y") + b"\x8f(" + inner + inner + b"\x90",
        "a shape": opcodes("y") + opcodes(Call(REBUILD, (storage("0", 6), 0, inner, (1,), False, None))),
        "a reference": opcodes("y") + inner + b"Q",
        "a name": opcodes("y") + inner + inner + b"\x93",
    }[place]
    path = save(tmp_path / "m.pt", b"\x80\x04}(" + opcodes("x") + opcodes(GOOD) + item + b"u.")
    if place in ("a key", "in a set") or (place == "a value" and kind in ("list", "tuple")):
        assert list(arrays(path)) == ["x"]
    else:
        with pytest.raises(ValueError, match=r"m\.pt:? ") as caught:
            open_torch_file(path)
        assert len(str(caught.value)) < 1500


def test_a_file_cannot_have_things_copied_again_and_again(tmp_path):
    many = b"(" + b"N" * 50_000
    calls = {
        "arguments": many + b"tq\x010" + (opcodes(Name("torch", "Size")) + b"h\x01R0") * 2_000,
        "a dict": b"](" + (b"(K\x01K\x02t") * 50_000 + b"eq\x010"
        + (opcodes(Name("collections", "OrderedDict")) + b"h\x01\x85R0") * 2_000,
        "text": opcodes("x" * 50_000) + b"q\x010" + (opcodes(Name("_codecs", "encode")) + b"h\x01\x85R0") * 2_000,
    }  # fmt: skip
    for name, data in calls.items():
        start = time.process_time()
        with pytest.raises(ValueError, match="bytes and copies more than twice as many things"):
            open_torch_file(save(tmp_path / "m.pt", b"\x80\x02" + data + opcodes({"x": GOOD}) + b"."))
        assert time.process_time() - start < 10, name
    collide = b"}(" + b"".join(b"\x8a\x0e" + (i * (2**61 - 1)).to_bytes(14, "little") + b"N" for i in range(50_000))
    start = time.process_time()
    assert list(arrays(save(tmp_path / "m.pt", b"\x80\x02" + collide + opcodes("x") + opcodes(GOOD) + b"u."))) == ["x"]
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02\x8b" + (1000).to_bytes(4, "little") + b"\x7f" * 1000 + b".", "it has an integer of 7,999 bits"),
        (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "Exceeds the limit"),
        (b"\x80\x05\x8e" + (1 << 62).to_bytes(8, "little") + b".", "expected 4611686018427387904 bytes"),
        (b"\x80\x02B\xff\xff\xff\xff.", "expected 4294967295 bytes"),
        (b"\x80\x06N.", "it is of protocol 6"),
        (b"\x80\x05\x97.", "it uses what no file has: NEXT_BUFFER"),
        (b"\x80\x02N(.", "holds no dict"),
        (b"\x80\x020.", "IndexError"),
        (b"\x80\x02h\x07.", "KeyError: 7"),
        (b"\x80\x02NN\x86NR.", "it calls what is no class"),
        (b"\x80\x02NNb.", "it gives a state to 'NoneType'"),
        (b"\x80\x02}NNs.", "holds not a single tensor"),
        (b"\x80\x02NNNs.", "keys and values to what is no dict"),
        (b"\x80\x02}(Nu.", "keys and values to what is no dict"),
        (b"\x80\x02NNa.", "it appends to what is no list"),
        (b"\x80\x04}(N\x90.", "it adds to what is no set"),
        (b"\x80\x04NN\x93.", "it names something by what is no string"),
        (b"\x80\x04" + opcodes(ORDERED.function) + b")}" + opcodes("a") + b"Ns\x92.", "with arguments by name"),
        (b"\x80\x02}", "exhausted before seeing STOP"),
    ],
)  # fmt: skip
def test_what_no_machine_can_do_is_refused_in_one_line(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"m\.pt[^\n]*{message}"):
        open_torch_file(save(tmp_path / "m.pt", data))


def test_names_of_a_key_that_is_used_again_and_again_end(tmp_path):
    key = opcodes("x" * 20_000) + b"q\x010"
    data = b"\x80\x02" + key + opcodes(GOOD) + b"q\x020" + b"}h\x01" * 300 + b"h\x02" + b"s" * 300 + b"."
    with pytest.raises(ValueError, match=r"xxx… \(\d+,\d+ characters\)' is too long for a name"):
        open_torch_file(save(tmp_path / "m.pt", data))


def test_a_tensor_of_more_numbers_than_the_file_has_bytes_is_refused(tmp_path):
    for size in ((1 << 40,), (1 << 20, 1 << 20)):
        path = save(tmp_path / "m.pt", {"x": tensor("0", size, (0,) * len(size), 6)})
        with pytest.raises(ValueError, match=r"'x' with shape .* does not lie inside its storage of 6 elements"):
            open_torch_file(path)


# --- records of the zip


def test_a_record_that_was_changed_is_known_by_its_crc(tmp_path):
    content = {"x": GOOD, "part": tensor("0", (2,), (1,), 6, 1)}
    path = save(tmp_path / "m.pt", content)
    data = path.read_bytes()
    place = data.index(np.arange(6, dtype=np.float32).tobytes())
    path.write_bytes(data[: place + 20] + b"\x01" + data[place + 21 :])  # not in the part
    for name in ("x", "part"):
        with pytest.raises(
            ValueError, match=rf"^{path} is damaged: archive/data/0 has the CRC-32 \w{{8}}, not \w{{8}}; "
        ):
            np.asarray(open_torch_file(path)[name])
    place = data.index(b"_rebuild_tensor_v2")
    path.write_bytes(data[:place] + b"X" + data[place + 1 :])
    with pytest.raises(ValueError, match=rf"^{path} is damaged: archive/data\.pkl has the CRC-32"):
        open_torch_file(path)
    path.write_bytes(data.replace(struct.pack("<I", zlib.crc32(np.arange(6, dtype=np.float32).tobytes())), bytes(4)))
    np.testing.assert_array_equal(arrays(path)["x"], np.arange(6).reshape(2, 3))  # as torch says that there is none


def test_a_record_is_compared_once_however_many_tensors_it_has(tmp_path, monkeypatch):
    summed = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, start=0: summed.append(len(data)) or crc32(data, start))
    content = {str(i): tensor("0", (10,), (1,), 1000, 10 * i) for i in range(100)}
    opened = open_torch_file(save(tmp_path / "m.pt", content, {"0": np.arange(1000, dtype=np.float32)}))
    summed.clear()
    np.testing.assert_array_equal(np.concatenate([*map(np.asarray, opened.values())]), np.arange(1000))
    assert sum(summed) == 4000


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_or_in_one_place_are_refused(tmp_path):
    path = save(tmp_path / "m.pt", {"x": GOOD})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.ones(6, np.float32).tobytes())
    with pytest.raises(ValueError, match="the zip has two records of one name: archive/data/0"):
        open_torch_file(path)
    path = save(tmp_path / "m.pt", {"x": GOOD}, {str(i): np.zeros(1000) for i in range(2)})
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(2, 100):
            entry = copy.copy(archive.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{i}"
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
        archive._didModify = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="the zip has records in the place of others"):
        open_torch_file(path)
