"""Prompts to embeddings: cleaning, tokens of a tiny tokenizer, batches, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from rcm_jax.media import text
from rcm_jax.models.t5 import T5Encoder
from rcm_jax.util.files import as_path, upload
from tests.t5 import TINY, random_params
from tests.tiny import relative

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "sits"]


def write_tokenizer(folder, words=WORDS, ends=True):
    """tokenizer.json of whole words, in a new folder; like real ones, it has lengths of its own, to be overruled."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=3)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\tcat \n\n sits\u3000here ", "a cat sits here"),
        ("caf\u00c3\u00a9", "caf\u00e9"),  # UTF-8 that was read as Latin-1
        ("salt &amp;amp; pepper &lt;b&gt;", "salt & pepper <b>"),
        ("", ""),
        ("\u732b\u3001\u72ac", "\u732b\u3001\u72ac"),
    ],
)
def test_prompts_are_cleaned_as_wan_does_it(prompt, cleaned):
    assert text.clean(prompt) == cleaned


def test_prompts_end_and_are_padded(tmp_path, caplog):
    folder = write_tokenizer(tmp_path / "tokenizer")
    ids, mask = text.tokenize(folder, ["a cat sits", "", "a dog"], length=5)
    np.testing.assert_array_equal(ids, [[3, 4, 5, 1, 0], [1, 0, 0, 0, 0], [3, 2, 1, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    assert ids.dtype == mask.dtype == np.int32
    assert text.tokenize(folder, "a cat")[0].shape == (1, 512)
    assert not caplog.records


def test_long_prompts_are_cut_before_their_end_and_a_warning_has_the_numbers(tmp_path, caplog):
    ids, mask = text.tokenize(write_tokenizer(tmp_path / "tokenizer"), ["a cat sits a cat", "a cat"], length=4)
    np.testing.assert_array_equal(ids, [[3, 4, 5, 1], [3, 4, 1, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [1, 1, 1, 0]])
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 prompts end after 4 tokens; the longest has 6"
    ]


def test_folders_without_a_tokenizer_of_t5_are_refused(tmp_path):
    with pytest.raises(ValueError, match="missing is no folder"):
        text.tokenize(tmp_path / "missing", ["a"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        text.tokenize(tmp_path, ["a"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer, or damaged"):
        text.tokenize(tmp_path, ["a"])
    with pytest.raises(ValueError, match="no tokenizer of T5: it lacks </s> and <pad>"):
        text.tokenize(write_tokenizer(tmp_path / "words", ["<unk>", "a"], ends=False), ["a"])
    with pytest.raises(ValueError, match="does not end prompts with </s>"):
        text.tokenize(write_tokenizer(tmp_path / "endless", ends=False), ["a"])
    with pytest.raises(ValueError, match="0 prompts of 512 tokens"):
        text.tokenize(tmp_path, [])


def test_a_tokenizer_may_lie_in_an_object_store(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("RCM_CACHE", str(tmp_path / "cache"))
    bucket = s3("tokenizers")
    upload(write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json", as_path(f"{bucket}/umt5/tokenizer.json"))
    assert text.tokenize(f"{bucket}/umt5", "a cat sits", 5)[0].tolist() == [[3, 4, 5, 1, 0]]
    with pytest.raises(ValueError, match=f"{bucket}/else is no folder; name"):
        text.tokenize(f"{bucket}/else", "a cat")


@pytest.mark.smoke
def test_a_tokenizer_comes_from_the_cache_of_the_hub_by_its_name_and_torch_is_not_needed(tmp_path):
    """Offline, in processes of their own: the hub's folders are read from the environment."""
    commit = "0" * 40
    repository = tmp_path / "hub/models--some-one--umt5.x"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    write_tokenizer(repository / "snapshots" / commit)
    code = """
import sys
from rcm_jax.media import text
assert "transformers" not in sys.modules
print(text.tokenize(sys.argv[1], ["a cat sits"], 5)[0].tolist())
assert not {"torch", "tensorflow"} & set(sys.modules)
"""
    options = dict(env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}, capture_output=True, text=True)
    process = subprocess.run([sys.executable, "-c", code, "some-one/umt5.x"], **options)
    assert (process.returncode, process.stdout) == (0, "[[3, 4, 5, 1, 0]]\n"), process.stderr
    assert not process.stderr
    process = subprocess.run([sys.executable, "-c", code, "some-one/else"], **options)
    assert "ValueError: some-one/else is no folder, nor to be had from the hub: " in process.stderr.splitlines()[-1]


@pytest.mark.parametrize(("package", "call"), [("ftfy", text.clean), ("transformers", lambda p: text.tokenize(".", p))])
def test_missing_packages_are_named_with_the_extra(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"prompts: {package} is not installed: pip install 'rcm-jax\[sample\]'"):
        call("a cat")


def test_prompts_are_encoded_in_batches_of_one_shape(tmp_path):
    ids, mask = text.tokenize(write_tokenizer(tmp_path / "tokenizer"), ["a cat", "sits", "a cat sits"], length=5)
    whole = text.encode(TINY, random_params(), ids, mask)
    assert whole.shape == (3, 5, TINY.d_model) and not np.any(whole[mask == 0])
    assert relative(whole, T5Encoder(TINY).apply({"params": random_params()}, ids, mask)) < 1e-6
    before = text._encode._cache_size()
    parts = text.encode(TINY, random_params(), ids, mask, batch=2)
    assert text._encode._cache_size() == before + 1
    assert relative(parts, whole) < 1e-6
    narrow = text.encode(dataclasses.replace(TINY, dtype="bfloat16"), random_params(), ids, mask)
    assert narrow.dtype == jnp.bfloat16


def test_tokens_that_the_encoder_lacks_are_refused_with_the_numbers():
    ids = np.array([[3, TINY.vocab_size]])
    with pytest.raises(ValueError, match="the tokens are 3 to 20, the encoder has 0 to 19"):
        text.encode(TINY, random_params(), ids, np.ones_like(ids))
    with pytest.raises(ValueError, match=r"ids \(0, 5\), 8 prompts at a time"):
        text.encode(TINY, random_params(), np.zeros((0, 5), int), np.zeros((0, 5)))


def test_a_tokenizer_of_another_encoder_and_prompts_that_are_no_text_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    for size in (5, 12):
        with pytest.raises(ValueError, match=f"knows 6 tokens, the encoder {size}: take the one that is published"):
            text.tokenize(folder, ["a cat"], 4, vocab_size=size)
    assert text.tokenize(folder, ["a cat"], 4, vocab_size=8)[0].shape == (1, 4)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        text.tokenize(folder, ["caf\udce9"], 4)
