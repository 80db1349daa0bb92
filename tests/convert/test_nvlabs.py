"""Snapshots of NVlabs without torch: what they hold, and that nothing in them is executed.

The pickles are made here from opcodes; one was made by torch 2.13.
"""

import base64
import copyreg
import os
import zlib

import numpy as np
import pytest

from rcm_jax.convert.files import open_tensors
from rcm_jax.convert.nvlabs import open_snapshot
from tests.torch_pickle import (
    ORDERED,
    Call,
    Name,
    Reference,
    in_bytes,
    module,
    nested_modules,
    old_stream,
    opcodes,
    pickled,
    snapshot_tensor,
)

BY_TORCH = (
    "c-rk)?Qh#e7<XQpmbBZ-27_&YEQF{7!Akm)CWS(`!31OrWBU@Qs*~efdfr?+w$JMds#HF-bkj-uu;Uva_{g8JKV@I}6Oa(&@m*e=Hr=|RAv(>9@9"
    "ewZJ<s`f&&yr5(!ZE*D&pGY8cX3dgR?iN>zf3H)UpG;js3t1D0WQD**WB6({%#shbBe6E{fd74St_TBGPoD4agDGHiCe&(OVJ7b$B(yvTJTLv@r^"
    "Nlh<cbiejy`U7xB#UAE=BYw7`-)ebVIQOM6O?Q0RG`jz8gUlY=F$I-6{#kqy73Re@iRD>+Yq6ldLwp)31J+C$vYp&CUL{|`kY%Qnvpt*h*4AR%Jw"
    "MuASzBDW&P#4vn!mEaFtYHcQ)^i|xaHNk{qbd8S5w=<YnQBetRiXU}xVGU_fJ!Z(!CA#xaazv-G9X49YcqLuHn&_{$g2wr(<`|H>8W9Qcyd7aQ_x"
    "}n4RQ86(=5eiIh|K$a`|Co$tIX?;QHEfQJ>4JAHjF%#IRdhF1JS&SVo+4`5m8ICe?nND&H=n+fxezQ|ZbD!Fe^B#L7x8x4B1XfW5fT>(~o{J<G8B"
    "gk82AZ1`F+ufi`{`Nd0y9pK!4Ny~+mj-BXDgBr^VD<FG*5Z1)EEE9L^$N?+psh2(4l-Ulaa?(PwoXI6b4p7Ef3RV)FEuaR)!u`gmZ@|Jht9+M@qj"
    "s0s06N)N$B@L!IRv`mF5Kxu0Z6>Z*(ua8%$w_m-$ZR6BjUO@!JWrV*S4`q!K0(MZ~P|qaWmo^+&_1XvlIPcatJvSHJ?USfLft#4|ek!JC0hezYl+"
    "QuobOal%QzbY8Ua=9)w}98yf*K4VYiEgE`s5^gluNytBV&h>lm0AQm;@`v!);9`D#I`z*3uqxm?*x%~(?7}PL^WUvgxswNCh((phsWR#3mGvt+*@"
    "$+T;d>KEVA%2o^HX=TXlVg!bo!BLlk&9)d9?mA@VCh6r4DoRzwCrX-m_n!{l~{-51>Ks44vig?;{&LSRS40O(%B>TM2!s!9(|u*IF(S8t>oRT{nx"
    "LT{#0-Le)WvLmAvvt3d&7S(dv`1A#3|Cbs^rO&KAl`0HA&hdTfhQ*hgWfX&H`}+^uJ!G1_;b!1@6PUTV`zYxNOm3<$WrH&RX3AzUbyL%mEjT~9|c"
    "TxZoAt){~ebZYg{2rQ@UDW;4lmtf-bx@^pPiTZKCRA!5nN@W^~;!I`QlX8JzFICOdsF(g0q^)?$Fl@rmGfMp0`V5LC_`$se_isyln_uHqrJAg!c6"
    "c>aP3-VHA|6s`-xW_k!xKwKR>R51WKkna7ytg>Gx;U>-!LM}Go`{@r93}KWO68xeJl`}>~i?2@}NiBHm@eOhY}W&lOm0@AmOH?D98nK7d|}FW*9M"
    "2smzxO1ME#4$ezRkdlOGELq&N2_d~dq^NKPFw+eURykt5J=9%0Pb=*8d^4dL4PK$SPPF8Q%$UE{$mDRhldQVpG%Sw~g2eQh`N|#juwrW|KD&)pQt"
    "lLo!AJc_Gxl}G6DtvUY|2BLa{b(V$s8mYjLqv-{_UWU=4kSToa-H4qCJ)1C7)!yH0XDe3Oy1d}>Za>ZICem4WZC{UB03WM#QRA$3PR7#Nk+tuW$!"
    "kb%#v|37ti#h+%bd;qetF}iZio&Qb+1QV~|)dhSU%T>KaAj@p(58X@q=NBj3L$`J+@Um1Yl_KP2|Z<qvYXM%pio$(QB}vxhZ#fqfQ}-{xey8}x#("
    "!BTJ*;p8sM_K!3FX>dyvy8p_?qpmH^QJiJufokuJv|gyY_~?i)`uyBXX<*S42QRw7!lEa7i~caS*s#p992VceQ^M!Ej^mbtTG*f=9OYpiY{Cs`yd"
    "i9WwS_DrPp**E1UbCda34}I5FkE>rK7_x2j8xa#qE_HkB-U#?qzQ_-gF$>YUt64mb0-hj9{amo>{`-?6ecEwKsHRx<1y|LK_U+_l*ru9GHeJOpA>"
    "O4Af2W4?nadTeJMmZbY0`O|ir$yjH7y{Rl2mR29k_7t_Mmc7z}4{{Y~yo_+"
)
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
GOOD = snapshot_tensor(ARRAY)


def written(path, content):
    """A .pkl of what `opcodes` takes, or of a whole pickle."""
    path.write_bytes(content if isinstance(content, bytes) else pickled(content))
    return path


@pytest.mark.smoke
def test_a_snapshot_that_torch_made(tmp_path):
    """An object of a persistent class, in it a ModuleDict, a Sequential, a half, a buffer that is a view, a device."""
    opened = open_tensors(written(tmp_path / "m.pkl", zlib.decompress(base64.b85decode(BY_TORCH))))
    expected = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.bias": np.float16([1.5, -2]),
        "a.part": np.arange(12, dtype=np.float32).reshape(3, 4)[1:, ::2],
        "enc.8x8_x.weight": np.float32([[1, 2, 3]]),
        "enc.8x8_x.part": np.arange(12, dtype=np.float32).reshape(3, 4)[1:, ::2],
        "seq.0.weight": np.float32([[7]]),
    }
    assert list(opened) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(opened[name]), array, strict=True, err_msg=name)


def test_what_is_beside_the_tensors_is_left_out_and_modules_of_torch_are_modules(tmp_path):
    number = Call(Name("numpy.core.multiarray", "scalar"), (Name("numpy", "dtype"), "x"))
    array = Call(Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,)), (1, (2,)))
    layer = {"_parameters": {"weight": GOOD, "bias": None}, "_buffers": {"count": snapshot_tensor(ARRAY.T)}}
    torch_layer = opcodes(Name("torch.nn.modules.linear", "Linear")) + b")\x81" + opcodes(layer) + b"b"
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (GOOD, True, ORDERED))
    net = module({"x": parameter}, None, {"layer": torch_layer, "none": None}, scale=number, shift=array, mult=[1, 2])
    options = opcodes(Name("dnnlib.util", "EasyDict")) + b")\x81(" + opcodes("path") + opcodes("x") + b"u"
    hooks = Call(Name("builtins", "set"), ([],))
    content = {"ema": net, "loss_fn": module({"y": GOOD}), "dataset_kwargs": options, "hooks": hooks}
    opened = open_snapshot(written(tmp_path / "m.pkl", content))
    assert {name: tensor.shape for name, tensor in opened.items()} == {
        "x": (2, 3), "layer.weight": (2, 3), "layer.count": (3, 2)
    }  # fmt: skip
    np.testing.assert_array_equal(np.asarray(opened["layer.count"]), ARRAY.T)
    assert list(open_snapshot(tmp_path / "m.pkl", "loss_fn")) == ["y"]
    assert list(open_snapshot(written(tmp_path / "m.pkl", nested_modules({"a.b.c": ARRAY})))) == ["a.b.c"]
    with pytest.raises(ValueError, match=r"m\.pkl is no snapshot .*it has no module 'G', but ema, loss_fn"):
        open_snapshot(written(tmp_path / "m.pkl", content), "G")


LAYER = opcodes(Name("torch.nn.modules.container", "Sequential")) + b")\x81"
INSIDE = LAYER + b"}(" + opcodes("_modules") + b"}("  # uub behind the modules
HOSTILE = {
    "another name": ({"ema": Call(Name("os", "system"), ("touch executed",))}, "asks for 'os.system'"),
    "a name in a module": (module({"x": Call(Name("builtins", "eval"), ("1",))}), "asks for 'builtins.eval'"),
    "torch itself": ({"ema": Call(Name("torch", "load"), ("x",))}, "asks for 'torch.load'"),
    "a name in a tensor": (
        module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, storage=opcodes(Call(Name("os", "getcwd"), ()))))}),
        "asks for 'os.getcwd'",
    ),
    "a tensor in a tensor": (
        module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, storage=opcodes(GOOD)))}),
        "asks for 'torch._utils._rebuild_tensor_v2'",
    ),
    "a reference outside": (
        module({"x": Reference(("storage", Name("torch.storage", "_load_from_bytes"), "0", "cpu", 6))}),
        "it refers to a storage outside itself",
    ),
    "a state for a class": (
        {"ema": opcodes(Name("torch.nn.modules.linear", "Linear")) + opcodes({"state": 1}) + b"b"},
        "TypeError",
    ),
    "an extension": (b"\x80\x02\x82\xf0.", "extension code 240"),
    "an extension in a tensor": (
        module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, machine=b"\x82\xf0"))}), "extension code 240",
    ),
    "a memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "wants to memorise item 2147483647"),
    "a module in itself": (  # memorised before it gets its state
        b"\x80\x02" + opcodes(Name("torch.nn.modules.container", "Sequential")) + b")\x81q\x01"
        + b"}(" + opcodes("_modules") + b"}(" + opcodes("0") + b"h\x01uub.",
        "its modules are in each other more often than it has bytes",
    ),
    "modules in each other": (  # 2⁴⁰ of them
        b"\x80\x02" + LAYER + b"q\x00" + b"".join(
            INSIDE + opcodes("a") + b"h%c" % i + opcodes("b") + b"h%cuubq%c" % (i, i + 1) for i in range(40)
        ) + b".",
        "its modules are in each other more often than it has bytes",
    ),
    "modules in modules": (
        b"\x80\x02" + (INSIDE + opcodes("0")) * 2000 + LAYER + b"uub" * 2000 + b".", "RecursionError",
    ),
    "no module": ([1], "there is 'list' in the place of a module"),
    "no modules": ({"ema": [1]}, "no module 'ema', but none at all"),
    "half a file": (pickled(module({"x": GOOD}))[:-100], "is no snapshot"),
    "no magic": (module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, magic=opcodes(7)))}), "storage is not as torch"),
    "big-endian": (
        module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, machine=opcodes({"little_endian": False})))}),
        "little-endian",
    ),
    "another count": (
        module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, count=(5).to_bytes(8, "little")))}), "not 6 × float32",
    ),
    "too few bytes": (
        module({"x": snapshot_tensor(ARRAY, old_stream(ARRAY, memory=b"\0" * 23))}), "has 23 bytes, not 6 × float32",
    ),
    "no bytes": (module({"x": Call(Name("torch.storage", "_load_from_bytes"), (3,))}), "TypeError"),
    "other bytes": (module({"x": snapshot_tensor(ARRAY, b"PK\3\4")}), "is no snapshot"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_whatever_else_a_file_asks_for_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._inverted_registry, 240, ("os", "getcwd"))  # pyright: ignore[reportAttributeAccessIssue]
    content, message = HOSTILE[case]
    with pytest.raises(ValueError, match=r"m\.pkl is no snapshot of NVlabs") as caught:
        open_tensors(written(tmp_path / "m.pkl", content))
    assert message in str(caught.value) and "Nothing in it was executed; load it with torch" in str(caught.value)
    assert os.listdir(tmp_path) == ["m.pkl"]


def test_a_view_that_leaves_its_storage_is_refused(tmp_path):
    tensor = GOOD._replace(arguments=(GOOD.arguments[0], 1, *GOOD.arguments[2:]))
    with pytest.raises(ValueError, match="offset 1 does not lie inside its storage of 6 elements"):
        open_tensors(written(tmp_path / "m.pkl", module({"x": tensor})))


def test_what_is_behind_a_storage_is_not_read(tmp_path):
    stream = old_stream(ARRAY) + b"more"
    opened = open_tensors(written(tmp_path / "m.pkl", module({"x": snapshot_tensor(ARRAY, stream)})))
    np.testing.assert_array_equal(np.asarray(opened["x"]), ARRAY)
    assert in_bytes(b"ab") == b"B\2\0\0\0ab"
