"""Prompt suites: which file is which, where samples go, what is refused. Sampling them is in tests/scripts."""

import json

import pytest

from configs import cosmos_2b, wan_1_3b
from rcm_jax.run import generate, suite
from rcm_jax.util.files import write_text

VBENCH = [
    {"prompt_en": "a bird and a cat", "dimension": ["multiple_objects"], "auxiliary_info": {}},
    {"prompt_en": "a {} of “tea”", "dimension": ["color"]},
    {"prompt_en": "a bird and a cat", "dimension": ["overall_consistency"]},
]
OFFICIAL = [{"prompt": "a cat", "dimensions": ["color"], "augmented_prompt": "A long cat"}, {"prompt": "a dog"}]
GENEVAL = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}] * 2


def write(folder, content):
    (folder / "suite").write_text(content, encoding="utf-8")
    return folder / "suite"


def wanted(run=wan_1_3b, seeds=(0, 1)):
    """A request in the shapes of tiny Wan or Cosmos; its weights are not there."""
    run = run.tiny(run.EXPERIMENT)
    generator = generate.Generator("ckpt", None, False, run, generate.prompts_dataset(run), {})
    return generate.Request(generator, [], list(seeds), 4, None, None, 1)


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """plan(content of a file, **of the request) -> its plan in tmp_path/out; no checkpoint or autoencoder is read."""
    monkeypatch.setattr(suite.samples, "check_decoder", lambda generator: None)
    monkeypatch.setattr(suite.checkpoint, "params_of", lambda *_: (None, 7))
    return lambda content, **of: suite.make_plan(suite.read(write(tmp_path, content)), wanted(**of), tmp_path / "out")


def files(plan):
    return [(row, seed, str(path.relative_to(plan.folder))) for row, seed, path in plan.pending]


def test_vbench_is_sampled_once_for_each_prompt_under_its_name(plan):
    found = plan(json.dumps(VBENCH))
    assert found.settings["suite"] == "vbench" and suite.SUITES["vbench"].each == 5
    names = [(i, seed, f"samples/{VBENCH[i]['prompt_en']}-{seed}.mp4") for i in (0, 1) for seed in (0, 1)]
    assert files(found) == names and found.beside == {} and found.total == 4


def test_the_official_list_is_sampled_by_its_long_prompts_and_named_by_the_short_ones(plan, tmp_path):
    found = suite.read(write(tmp_path, json.dumps(OFFICIAL)))
    assert found.kind == "rcm" and found.prompts == ["A long cat", "a dog"]
    made = plan(json.dumps(OFFICIAL), seeds=(5, 3))
    assert files(made)[1:3] == [(0, 3, "samples/a cat-1.mp4"), (1, 5, "samples/a dog-0.mp4")]


def test_geneval_has_a_folder_for_each_line_with_the_line_in_it(plan):
    found = plan("".join(json.dumps(line) + "\n" for line in GENEVAL), run=cosmos_2b)
    assert [name for *_, name in files(found)] == [
        f"samples/0000{i}/samples/000{k}.png" for i in (0, 1) for k in (0, 1)
    ]
    beside = {str(path.relative_to(found.folder)): json.loads(text) for path, text in found.beside.items()}
    assert beside == {f"samples/0000{i}/metadata.jsonl": GENEVAL[0] for i in (0, 1)}
    with pytest.raises(ValueError, match=r"geneval reads .png, but 5 frames make .mp4"):
        plan("".join(json.dumps(line) + "\n" for line in GENEVAL))


def test_a_text_has_a_prompt_on_each_line(plan):
    assert [name for *_, name in files(plan("a cat\n\n a dog \na cat\n", run=cosmos_2b, seeds=(0,)))] == [
        "samples/a cat-0.png",
        "samples/a dog-0.png",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no prompt suite, which are: VBench_full_info.json"),
        ('[{"prompt_zh": "a"}]', "is no prompt suite"),
        ('{"prompt": "a"', "is no prompt suite"),
        (json.dumps([{"prompt": "a", "augmented_prompt": x} for x in "bc"]), "two prompts that go by one name, 'a'"),
        ("his/her cat", "no file can be named after the prompt 'his/her cat': it has a '/'"),
        ("é" * 121, "makes more than 245 bytes"),
    ],
)
def test_what_is_no_suite_or_can_have_no_file_is_refused(plan, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        plan(content)
    assert not (tmp_path / "out").exists()
    plan("é" * 119)


def test_a_folder_belongs_to_one_request(plan, tmp_path):
    first = plan("a cat\na dog")
    write_text(first.folder / suite.SETTINGS, json.dumps(first.settings))
    write_text(first.folder / "samples" / "a cat-1.mp4", "there")
    assert [name for *_, name in files(plan("a cat\na dog"))] == [
        "samples/a cat-0.mp4",
        "samples/a dog-0.mp4",
        "samples/a dog-1.mp4",
    ]
    with pytest.raises(ValueError, match=r"seeds: \[0, 1\] there, \[0, 2\] here"):
        plan("a cat\na dog", seeds=(0, 2))
    with pytest.raises(ValueError, match="sha256"):
        plan("a cat\na cow")
    (first.folder / suite.SETTINGS).unlink()
    with pytest.raises(ValueError, match="is there and not an empty folder"):
        plan("a cat\na dog")
