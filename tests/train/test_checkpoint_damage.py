"""Checkpoints that are damaged: none is restored, none pushes a whole one out."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rcm_jax.parallel.sharding import MeshConfig, make_mesh
from rcm_jax.train import checkpoint, digests
from rcm_jax.train.rotation import Rotation, go_back, superseded
from rcm_jax.train.state import Learner, TrainState
from rcm_jax.util.files import as_path
from tests.stores import contents
from tests.tiny import assert_trees_equal

MESH = make_mesh(MeshConfig(data=2, fsdp=4))


class Data:
    """The position of an iterator."""

    def __init__(self, position=0):
        self.position = position

    def get_state(self):
        return {"at": self.position}

    def set_state(self, state):
        self.position = state["at"]


def make_state(step: int, mesh=MESH, axes=("fsdp",)) -> TrainState:
    """A state whose arrays no other step has."""
    rng = np.random.default_rng(step)
    w, b = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=8).astype(ml_dtypes.bfloat16)
    split, whole = NamedSharding(mesh, PartitionSpec(*axes)), NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.device_put(w, split), "b": jax.device_put(b, whole)}
    count = jax.device_put(np.int32(step), whole)
    learner = Learner(params, ({"mu": jax.device_put(w * 2, split)}, None, (count,)), count)
    return TrainState(step=count, student=learner, ema={"w": jax.device_put(w / 2, split)})


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract_of(make_state(0))


def written(workdir, *steps, keep=9, **options) -> None:
    """Checkpoints of those steps, with no rotation unless it is asked for."""
    with Rotation(workdir, ABSTRACT, keep, **options) as kept:
        for step in steps:
            kept.save(make_state(step), Data(step))
        kept.finish(make_state(steps[-1]), Data(steps[-1]))


def restored(workdir, abstract=ABSTRACT) -> TrainState:
    data = Data()
    with Rotation(workdir, abstract, 2) as kept:
        state = kept.restore(data)
        assert data.position == int(state.step)
        return state


def steps_in(folder) -> list[str]:
    return sorted(path.name for path in as_path(folder).iterdir()) if as_path(folder).exists() else []


def arrays_of(folder):
    """The file of a checkpoint's item that has its arrays."""
    return max((folder / "d").iterdir(), key=lambda path: len(path.read_bytes()))


def inverted(path, count=8):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + count] = bytes(255 - byte for byte in content[middle : middle + count])
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


# --- digests


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bfloat16", "float16", "bool", "int8", "uint16"])
def test_a_digest_is_of_the_bits_wherever_they_lie(dtype):
    with jax.enable_x64(True):
        x = (np.random.default_rng(0).normal(size=(4, 6, 8)) * 50).astype(dtype)
        places = [PartitionSpec(), PartitionSpec("data", None, "fsdp"), PartitionSpec(None, "data", "fsdp")]
        there = [jax.device_put(x, NamedSharding(MESH, spec)) for spec in places]
        sums = [digests._on_devices(array) for array in (jnp.asarray(x), *there)]
        sums += [digests._here(array) for array in (x, x.copy(order="F"), np.asarray(there[1]))]
        assert len({tuple(both.tolist()) for both in sums}) == 1
        digest = digests.of_tree({"x": there[1]})["x"]
        assert digest.endswith(f"{sums[0][0]:08x}{sums[0][1]:08x}")
        assert digests.parsed(digest) == jax.ShapeDtypeStruct(x.shape, x.dtype)


def test_any_other_bit_place_or_shape_makes_another_digest():
    x = np.random.default_rng(0).normal(size=600).astype(np.float32)
    bits = x.view(np.uint32)
    others = []
    for element in range(0, 600, 7):
        for bit in range(32):
            bits[element] ^= np.uint32(1) << np.uint32(bit)
            others.append(digests.of_tree(x)[""])
            bits[element] ^= np.uint32(1) << np.uint32(bit)
    for signs in ([0, 1], [3, 500]):  # sums that are linear in the bits would not see two changed signs
        changed = x.copy()
        changed[signs] *= -1
        others.append(digests.of_tree(changed)[""])
    others += [digests.of_tree(y)[""] for y in (np.roll(x, 1), x[::-1], x.reshape(2, 300))]
    assert digests.of_tree(x)[""] not in others and len(set(others)) == len(others)


def test_a_digest_moves_sums_alone_between_devices():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec("data", "fsdp")))
    program = digests._program(x.sharding).lower(x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1024 < 64 * 64 * 4 // 8


# --- going on after damage

DAMAGES = {
    "inverted": lambda at: inverted(arrays_of(at / "student")),
    "inverted ema": lambda at: inverted(arrays_of(at / "ema")),
    "truncated": lambda at: truncated(arrays_of(at / "student")),
    "empty": lambda at: arrays_of(at / "student").write_bytes(b""),
    "missing": lambda at: arrays_of(at / "student").unlink(),
    "folder": lambda at: shutil.rmtree(at / "ema"),
    "arrays": lambda at: shutil.rmtree(at / "student" / "d"),
    "metadata": lambda at: (at / "student" / "_METADATA").write_text('{"tree_metadata": {'),
    "no metadata": lambda at: (at / "student" / "_METADATA").unlink(),
    "manifest": lambda at: truncated(at / "student" / "manifest.ocdbt"),
    "record": lambda at: (at / "record" / "metadata").write_text('{"healthy": tr'),
    "no record": lambda at: shutil.rmtree(at / "record"),
    "other record": lambda at: (at / "record" / "metadata").write_text("[" * 100_000),
    "position": lambda at: (at / "data" / "metadata").write_text('{"json": {"at": 7}}'),
    "no position": lambda at: shutil.rmtree(at / "data"),
}


# What the log names, where it is not the student.
NAMED = {"inverted ema": "ema", "folder": "ema", "position": "data", "no position": "data"}
NAMED |= dict.fromkeys(("record", "no record", "other record"), "record cannot be read")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A workdir with steps 2 and 4, to be copied."""
    workdir = tmp_path_factory.mktemp("two")
    written(workdir, 2, 4)
    return workdir


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_taken(
    damage, two_checkpoints, tmp_path, caplog
):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "checkpoints/4")
    before = {p.relative_to(tmp_path / "checkpoints/4") for p in (tmp_path / "checkpoints/4").rglob("*")}
    with caplog.at_level("WARNING", logger="absl"):
        assert_trees_equal(restored(tmp_path), make_state(2))
    told = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(told) == 1 and "checkpoint of step 4" in told[0] and "\n" not in told[0]
    assert NAMED.get(damage, "student") in told[0]
    assert steps_in(tmp_path / "checkpoints") == ["2"] and steps_in(tmp_path / "damaged") == ["4"]
    assert {p.relative_to(tmp_path / "damaged/4") for p in (tmp_path / "damaged/4").rglob("*")} == before


def test_whatever_happens_to_a_file_the_same_bits_are_restored_or_those_before(two_checkpoints, tmp_path):
    """Orbax keeps some things twice, or for others."""
    files = sorted(
        p.relative_to(two_checkpoints) for p in (two_checkpoints / "checkpoints/4").rglob("*") if p.is_file()
    )
    assert len(files) > 15
    expected = {step: make_state(step) for step in (2, 4)}
    for i, file in enumerate(files):
        shutil.copytree(two_checkpoints, workdir := tmp_path / str(i))
        (inverted, truncated, lambda path: path.unlink())[i % 3](workdir / file)
        state = restored(workdir)
        assert_trees_equal(state, expected[int(state.step)])


def test_both_of_the_newest_are_damaged_and_a_name_that_is_taken_is_not_overwritten(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    written(tmp_path, 6)
    (tmp_path / "damaged/6").mkdir(parents=True)
    for step in (4, 6):
        inverted(arrays_of(tmp_path / f"checkpoints/{step}/student"))
    assert_trees_equal(restored(tmp_path), make_state(2))
    assert steps_in(tmp_path / "damaged") == ["4", "6", "6_1"]


def test_if_none_is_whole_all_are_named_and_stay_where_they_are(two_checkpoints, tmp_path):
    """Otherwise the same command would then begin anew."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    DAMAGES["inverted"](tmp_path / "checkpoints/4")
    DAMAGES["record"](tmp_path / "checkpoints/2")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no checkpoint in .* is whole.* step 4: student.* step 2: record"
        ) as refusal:
            restored(tmp_path)
        assert "\n" not in str(refusal.value)
    assert steps_in(tmp_path / "checkpoints") == ["2", "4"] and not (tmp_path / "damaged").exists()


def test_another_network_is_no_damage(two_checkpoints):
    ema = {"w": jax.ShapeDtypeStruct((16, 9), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec()))}
    with pytest.raises(
        ValueError, match=r"ema in .*4 is of another network .*: w has shape \[16, 8\] there, \[16, 9\] here"
    ):
        restored(two_checkpoints, ABSTRACT.replace(ema=ema))
    with pytest.raises(ValueError, match=r"checkpoints/4 has no fake_score"):
        restored(two_checkpoints, ABSTRACT.replace(fake_score=ABSTRACT.student))
    fewer = dataclasses.replace(ABSTRACT.student, opt_state=())
    with pytest.raises(ValueError, match=r"opt_state.0.mu has shape \[16, 8\] there, none here"):
        restored(two_checkpoints, ABSTRACT.replace(student=fewer))
    assert steps_in(two_checkpoints / "checkpoints") == ["2", "4"]


@pytest.mark.parametrize("axes", [(), (None, "data"), (("data", "fsdp"),)])
def test_what_is_restored_otherwise_over_devices_is_whole(axes, two_checkpoints):
    other = make_state(4, axes=axes)
    state = restored(two_checkpoints, abstract_of(other))
    assert_trees_equal(state, other)
    assert state.ema["w"].sharding == other.ema["w"].sharding


def test_arrays_are_read_in_groups_of_bounded_bytes(two_checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 200)
    sizes, handler = [], ocp.type_handlers.ArrayHandler
    deserialize = handler.deserialize
    monkeypatch.setattr(handler, "deserialize", lambda *args: (sizes.append(len(args[1])), deserialize(*args))[1])
    assert_trees_equal(restored(two_checkpoints), make_state(4))
    assert sizes == [2, 3, 1]  # w and mu take 128 bytes a device


def test_checkpoints_from_before_there_were_digests_are_read_and_told_of(two_checkpoints, tmp_path, caplog):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (2, 4):
        as_before(tmp_path / f"checkpoints/{step}")
    with caplog.at_level("WARNING", logger="absl"), Rotation(tmp_path, ABSTRACT, keep=1) as kept:
        assert_trees_equal(kept.restore(Data()), make_state(4))
        assert kept.verified == set()
        kept.save(make_state(6), Data(6))
    assert caplog.text.count("before checkpoints had digests") == 2  # of 4, and of 2 when it may go
    assert steps_in(tmp_path / "checkpoints") == ["6"]
    abstract = {"w": ABSTRACT.ema["w"]}
    as_before(tmp_path / "checkpoints/6")
    assert_trees_equal(checkpoint.restore_item(tmp_path, "ema", abstract), make_state(6).ema)


def as_before(folder):
    """A checkpoint without its record, as older versions wrote it."""
    shutil.rmtree(folder / "record")
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del metadata["item_handlers"]["record"]
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))


# --- which of them stay


@pytest.mark.parametrize(
    ("healthy", "verified", "keep", "every", "gone"),
    [
        ("+1 +2 +3", {1, 2, 3}, 2, 0, [1]),
        ("+1 +2 +3", {1, 2}, 2, 0, []),  # 3 has not been read back
        ("+1 +2 +3", {3}, 1, 0, [1, 2]),
        ("+1 +2 +3 +4 +5", {1, 2, 3, 4, 5}, 1, 2, [1, 3]),
        ("+1 +2 -3 -4 -5", {1, 2, 3, 4, 5}, 2, 0, [3, 4]),
        ("+1 +2 -3 -4 -5", {1, 2, 3, 4}, 2, 0, [3]),
        ("+1 -2 +3 +4", {1, 2, 3, 4}, 2, 2, [1, 2]),  # of unhealthy ones no multiples
        ("-1 -2", {1, 2}, 2, 0, [1]),
    ],
)
def test_what_may_go(healthy, verified, keep, every, gone):
    steps = {abs(int(word)): word[0] == "+" for word in healthy.split()}
    assert superseded(steps, verified, keep, every) == gone


@pytest.mark.parametrize("asynchronous", [False, True])
def test_older_checkpoints_go_when_a_newer_one_has_been_read_back(asynchronous, tmp_path, monkeypatch):
    seen = []
    rotate = Rotation._rotate
    monkeypatch.setattr(Rotation, "_rotate", lambda kept: (seen.append((kept.steps, max(kept.verified))), rotate(kept)))
    written(tmp_path, 2, 3, 4, 6, 8, keep=1, keep_every=4, asynchronous=asynchronous)
    assert seen == [([2], 2), ([2, 3], 3), ([3, 4], 4), ([4, 6], 6), ([4, 6, 8], 8)]
    assert steps_in(tmp_path / "checkpoints") == ["4", "8"]
    assert_trees_equal(restored(tmp_path), make_state(8))


def damaging(monkeypatch, times: dict[int, int]):
    """From now on the checkpoints of those steps are damaged as they are written, so many times."""

    def save(manager, step, *args):
        saving(manager, step, *args)
        if times.get(step, 0):
            times[step] -= 1
            manager.wait_until_finished()
            inverted(arrays_of(manager.directory / str(step) / "student"))

    saving = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_new_checkpoint_that_is_damaged_pushes_no_older_one_out(asynchronous, tmp_path, monkeypatch, caplog):
    damaging(monkeypatch, {4: 2})
    written(tmp_path, 2, 4, keep=1)
    assert steps_in(tmp_path / "checkpoints") == ["4"] and steps_in(tmp_path / "damaged") == ["4", "4_1"]
    damaging(monkeypatch, {6: 9})
    with Rotation(tmp_path, ABSTRACT, 1, asynchronous=asynchronous) as kept:
        kept.save(make_state(6), Data(6))
        kept.save(make_state(8), Data(8))  # whole
        with pytest.raises(OSError, match="the end is not saved"):
            kept.finish(make_state(6), Data(6))
    assert "the checkpoint of step 6 is damaged (student" in caplog.text
    assert steps_in(tmp_path / "checkpoints") == ["8"]


def test_the_last_checkpoint_is_written_again_if_it_was_damaged_while_training_ended(tmp_path, monkeypatch):
    damaging(monkeypatch, {2: 1})
    written(tmp_path, 2, asynchronous=True)
    assert steps_in(tmp_path / "damaged") == ["2"]
    assert_trees_equal(restored(tmp_path), make_state(2))


def test_a_run_that_is_interrupted_keeps_one_more_until_it_has_been_read(tmp_path):
    written(tmp_path, 2)
    with Rotation(tmp_path, ABSTRACT, keep=1, asynchronous=True) as kept:
        kept.save(make_state(4), Data(4))
    assert steps_in(tmp_path / "checkpoints") == ["2", "4"]


def test_a_diverged_student_does_not_push_healthy_checkpoints_out(tmp_path):
    with Rotation(tmp_path, ABSTRACT, keep=2) as kept:
        for step, healthy in ((2, True), (4, True), (6, False), (8, False)):
            kept.save(make_state(step), Data(step), healthy)
    assert steps_in(tmp_path / "checkpoints") == ["2", "4", "8"]
    with Rotation(tmp_path, ABSTRACT, keep=2) as kept:  # which reads what the records say
        assert int(kept.restore(Data()).step) == 8
        kept.save(make_state(10), Data(10), False)
        assert kept.steps == [2, 4, 10]
        kept.save(make_state(12), Data(12))
        kept.save(make_state(14), Data(14))
        assert kept.steps == [12, 14]


def test_what_was_being_deleted_by_a_process_that_was_killed_is_removed(tmp_path):
    written(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoints/2", tmp_path / "checkpoints/1.going")
    assert_trees_equal(restored(tmp_path), make_state(2))
    assert steps_in(tmp_path / "checkpoints") == ["2"]


# --- going back


def test_going_back_sets_aside_what_is_later(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    written(tmp_path, 6)
    for step in (2, 4):
        checkpoint.save_snapshot(tmp_path, make_state(step), {0.1: make_state(step).ema})
    moved = go_back(tmp_path, 2)
    assert [path.removeprefix(f"{tmp_path}/set_aside/") for path in moved] == [
        "checkpoints/6",
        "checkpoints/4",
        "snapshots/4",
    ]
    assert_trees_equal(restored(tmp_path), make_state(2))
    assert checkpoint.snapshots_of(tmp_path) == [(2, 2, 0.1)]
    written(tmp_path, 4)
    assert go_back(tmp_path, 2) == [f"{tmp_path}/set_aside/checkpoints/4_1"]
    assert go_back(tmp_path, 2) == []
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 in .*; steps there: \[2\]"):
        go_back(tmp_path, 3)


# --- who only reads


def test_readers_refuse_what_is_damaged_and_move_nothing(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    inverted(arrays_of(tmp_path / "checkpoints/4/ema"))
    inverted(arrays_of(tmp_path / "checkpoints/2/student"))
    refusal = r"checkpoint of step 4 in .* is damaged: ema.*; others there: 2 \(--checkpoint_step\)"
    for read in (checkpoint.restore_item, checkpoint.restore_params):
        for step in (None, 4):
            with pytest.raises(ValueError, match=refusal):
                read(tmp_path, "ema", step=step, abstract=ABSTRACT.ema)
    assert_trees_equal(checkpoint.restore_params(tmp_path, "ema", 2)[0], make_state(2).ema)
    with pytest.raises(ValueError, match=r"step 2 in .* is damaged: student"):
        checkpoint.restore_params(tmp_path, "student", 2)
    (tmp_path / "checkpoints/2/ema/_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"step 2 in .* is damaged: ema cannot be read"):
        checkpoint.params_of(tmp_path, "ema", 2)
    assert steps_in(tmp_path / "checkpoints") == ["2", "4"] and not (tmp_path / "damaged").exists()


def test_damage_is_seen_whatever_dtype_is_asked_for(tmp_path):
    written(tmp_path, 2)
    wide = {"b": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec("fsdp")))}
    b = make_state(2).student.params["b"]
    found = checkpoint.restore_item(tmp_path, "student", {"params": wide})["params"]["b"]
    assert found.dtype == jnp.float32 and found.sharding == wide["b"].sharding
    assert_trees_equal(found, b.astype(jnp.float32))
    record = tmp_path / "checkpoints/2/record/metadata"
    digest = digests.of_tree(b)[""]
    record.write_text(record.read_text().replace(digest, digest[:-8] + "00000000"))
    with pytest.raises(ValueError, match=r"student.params.b has digest"):
        checkpoint.restore_item(tmp_path, "student", {"params": wide})


def test_damage_of_parameters_that_no_training_saved_and_of_snapshots(tmp_path):
    params = {
        "w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32),
        "b": np.ones(3, ml_dtypes.bfloat16),
    }
    checkpoint.write_params(tmp_path / "new", params)
    assert_trees_equal(checkpoint.restore_params(tmp_path / "new", "ema")[0], params)
    inverted(tmp_path / "new/checkpoints/0/ema/w/0.0")
    with pytest.raises(ValueError, match=r"step 0 in .*new is damaged: ema.*; others there: none$"):
        checkpoint.restore_params(tmp_path / "new", "ema")
    checkpoint.save_snapshot(tmp_path, make_state(2), {0.1: params})
    inverted(arrays_of(tmp_path / "snapshots/2/0.1"))
    with pytest.raises(ValueError, match=r"the snapshot of step 2 in .* is damaged: 0.1.*; others there: none$"):
        checkpoint.restore_params(tmp_path, "0.1", kind=checkpoint.SNAPSHOTS)
    (tmp_path / "snapshots/2/count/metadata").write_text('{"updates": 3}')
    with pytest.raises(ValueError, match=r"the snapshot of step 2 in .* is damaged: count"):
        checkpoint.snapshots_of(tmp_path)


def test_what_cannot_be_read_now_is_no_damage(two_checkpoints, monkeypatch):
    def busy(folder, *args, **kwargs):
        raise ValueError("UNAVAILABLE: Error reading object: try later")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", busy)
    with pytest.raises(OSError, match=r"cannot be read: .*UNAVAILABLE"):
        restored(two_checkpoints)
    assert steps_in(two_checkpoints / "checkpoints") == ["2", "4"]


# --- in a store


def test_in_a_store_too_damaged_checkpoints_are_set_aside_and_old_ones_go(s3):
    run = f"{s3('damage')}/run"
    written(run, 2, 4, 6, keep=2)
    assert {name.split("/")[1] for name in contents(run)} == {"4", "6"}
    names = [name for name in contents(run) if name.startswith("checkpoints/6/student/d/")]
    path = as_path(run) / max(names, key=lambda name: len(contents(run)[name]))
    inverted(path)
    whole = {name.removeprefix("checkpoints/") for name in contents(run) if name.startswith("checkpoints/6/")}
    assert_trees_equal(restored(run), make_state(4))
    found = contents(run)
    assert {name.removeprefix("damaged/") for name in found if not name.startswith("checkpoints/4/")} == whole


# --- of several processes


def test_all_processes_come_to_the_same_verdict_when_one_of_them_sees_damage(tmp_path):
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.train.two_processes", str(port)]
    running = [
        subprocess.Popen([*command, str(i), tmp_path], env=environment, stdout=-1, stderr=-1, text=True) for i in (0, 1)
    ]
    ends = [process.communicate(timeout=120) for process in running]
    refused = "refused the checkpoint of step 6 True"
    for said, errors in ends:
        assert [line for line in said.splitlines() if "Gloo" not in line] == [
            "kept [4, 6]",
            refused,
            "restored 4 True [4]",
        ], errors
    assert "checkpoint of step 6 is damaged (student cannot be read: OSError: a bad sector)" in ends[0][1]
    assert steps_in(tmp_path / "damaged") == ["6"]
