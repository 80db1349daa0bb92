"""The training loop: exact resume, signals, metrics, checkpoints."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rcm_jax.data.dataset import batches
from rcm_jax.parallel.sharding import MeshConfig, make_mesh, replicated
from rcm_jax.train import checkpoint, trainer
from rcm_jax.train.guard import Diverged
from rcm_jax.train.metrics import read_metrics
from rcm_jax.train.trainer import Interrupted, TrainConfig
from tests import tiny
from tests.tiny import assert_trees_close, assert_trees_equal

fast_compilation = pytest.fixture(scope="module", autouse=True)(tiny.fast_compilation)

TRAIN = TrainConfig(steps=40, batch_size=8, log_every=5, checkpoint_every=20, sample_every=1000, keep=2)
METHODS = ("diffusion", "rcm")


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """A restarted training compiles the same programs again: once is enough here."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def start(kind, workdir, mesh=None, *, config=TRAIN, data=None, on_sample=None, **averages):
    """Train as a new process would: everything is made anew. Returns (state, data iterator)."""
    mesh = tiny.one_device() if mesh is None else mesh
    F, params = tiny.dit()
    method = tiny.pretraining(F, **averages) if kind == "diffusion" else tiny.distillation(F)
    teacher = jax.device_put(tiny.teacher(None if kind == "diffusion" else params), replicated(mesh))
    training = tiny.make_training(method, mesh, config=config, key=1)
    data = batches(tiny.arrays(), config.batch_size, seed=3) if data is None else data
    return trainer.fit(training, trainer.place(training, params), teacher, data, workdir, on_sample), data


def restored(workdir, step):
    """All of a checkpoint but the position in the data."""
    with checkpoint.open_manager(workdir) as manager:
        items = {name: ocp.args.StandardRestore() for name in ("student", "ema", "fake_score")}
        return dict(manager.restore(step, args=ocp.args.Composite(**items)).items())


def steps_of(rows):
    return [row["step"] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """kind -> (state, data, workdir) of 40 steps in one go, made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            workdir = tmp_path_factory.mktemp(kind)
            made[kind] = (*start(kind, workdir), workdir)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", METHODS)
def test_twenty_steps_and_twenty_after_a_restart_are_forty_to_the_last_bit(kind, uninterrupted, tmp_path):
    expected, expected_data, expected_dir = uninterrupted(kind)
    start(kind, tmp_path, config=dataclasses.replace(TRAIN, steps=20))
    assert steps_of(read_metrics(tmp_path)) == [5, 10, 15, 20]
    state, data = start(kind, tmp_path)
    assert int(state.step) == 40
    assert_trees_equal(state, expected)
    assert data.get_state() == expected_data.get_state()
    assert read_metrics(tmp_path) == read_metrics(expected_dir)


def test_the_rcm_run_crosses_every_phase_and_logs_each(uninterrupted):
    state, _, workdir = uninterrupted("rcm")
    F, _ = tiny.dit()
    phases = [tiny.distillation(F).phase(i) for i in range(40)]
    assert set(phases) == {"warmup", "student", "critic"}
    assert int(state.student.updates) == len(phases) - phases.count("critic")
    assert int(state.fake_score.updates) == phases.count("critic")
    rows = read_metrics(workdir)
    assert steps_of(rows) == list(range(5, 41, 5))
    assert "dmd/loss" not in rows[0]
    assert {"scm/loss", "dmd/loss", "critic/loss"} <= set(rows[-1])
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_every_step_draws_with_a_key_of_its_own(tmp_path):
    """fold_in(key, step): a resumed step draws what it would have drawn, another step something else."""
    F, params = tiny.dit()

    def draw(state, teacher, batch, key):
        return state.replace(step=state.step + 1), {"draw": jax.random.uniform(key)}

    method = tiny.pretraining(F)._replace(steps={"diffusion": draw})
    training = tiny.make_training(method, tiny.one_device(), config=TRAIN, key=1)
    state, draws = trainer.place(training, params), []
    for _ in range(3):
        state, metrics = training.steps["diffusion"](state, tiny.teacher(None), {})
        draws.append(float(metrics["draw"]))
    expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(1), i))) for i in range(3)]
    assert draws == expected and len(set(draws)) == 3


def test_training_lowers_the_diffusion_loss(uninterrupted):
    """Of a network on 40 random images: it learns at least to predict the mean."""
    rows = read_metrics(uninterrupted("diffusion")[2])
    assert rows[-1]["diffusion/loss"] < 0.95 * rows[0]["diffusion/loss"]


def test_after_a_crash_the_run_goes_on_from_the_checkpoint_and_no_step_is_logged_twice(uninterrupted, tmp_path):
    expected, _, expected_dir = uninterrupted("diffusion")

    def crash(state, step):
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        start("diffusion", tmp_path, config=dataclasses.replace(TRAIN, sample_every=32), on_sample=crash)
    assert steps_of(read_metrics(tmp_path)) == [5, 10, 15, 20, 25, 30]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "diffu')  # cut off while being written
    state, _ = start("diffusion", tmp_path)
    assert_trees_equal(state, expected)
    assert read_metrics(tmp_path) == read_metrics(expected_dir)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_no_bit(uninterrupted, tmp_path):
    expected, _, expected_dir = uninterrupted("diffusion")
    config = dataclasses.replace(TRAIN, checkpoint_every=10)
    start("diffusion", tmp_path, config=dataclasses.replace(config, steps=20))
    arrays = max((tmp_path / "checkpoints/20/student/d").iterdir(), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:-8] + b"training")
    state, _ = start("diffusion", tmp_path, config=config)
    assert_trees_equal(state, expected)
    assert read_metrics(tmp_path) == read_metrics(expected_dir)
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["20"]


def test_a_run_on_a_mesh_resumes_to_the_last_bit_with_its_shardings(tmp_path):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config = dataclasses.replace(TRAIN, steps=6, checkpoint_every=3)
    expected, _ = start("diffusion", tmp_path / "a", mesh, config=config)
    start("diffusion", tmp_path / "b", mesh, config=dataclasses.replace(config, steps=3))
    state, _ = start("diffusion", tmp_path / "b", mesh, config=config)
    assert_trees_equal(state, expected)
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, expected)
    assert all(jax.tree.leaves(same))
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "6")
    alone, _ = start("diffusion", tmp_path / "b", config=config)  # on one device
    assert int(alone.step) == 6 and int(alone.student.updates) == 6
    assert_trees_close(alone, expected, rtol=1e-3, atol=2e-5)


def poisoned(*examples):
    """The data with some that are not finite."""
    arrays = tiny.arrays()
    arrays["x0"][list(examples)] = np.nan
    return arrays


def test_a_bad_example_costs_no_update_and_is_named(tmp_path, caplog):
    config = dataclasses.replace(TRAIN, log_every=3)
    data = batches(poisoned(5), config.batch_size, seed=3)
    with caplog.at_level("WARNING", logger="absl"):
        state, _ = start("rcm", tmp_path, config=config, data=data)
    assert int(state.step) == 40
    rows = read_metrics(tmp_path)
    assert not any(row.get("student/skipped") or row.get("critic/skipped") for row in rows)
    assert any(row.get("critic/nonfinite") or row.get("scm/nonfinite") for row in rows)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    assert "example 5 of the data is not finite" in caplog.text and 'leave_out="(5,)"' in caplog.text


def test_an_example_left_out_gives_its_turn_to_the_next_and_the_rest_stays(tmp_path):
    config = dataclasses.replace(TRAIN, steps=10)
    left_out = batches(poisoned(5, 6), 8, seed=3, leave_out=(5, 6))
    clean = tiny.arrays()
    for array in (clean["x0"], clean["cond"]["label"]):
        array[5:7] = array[7]
    state, _ = start("rcm", tmp_path / "a", config=config, data=left_out)
    same, _ = start("rcm", tmp_path / "b", config=config, data=batches(clean, 8, seed=3))
    assert_trees_equal(state, same)


@pytest.mark.parametrize("log_every", [1, 7])
def test_a_run_that_learns_nothing_stops_whatever_its_log_and_goes_on_with_better_data(log_every, tmp_path):
    config = dataclasses.replace(TRAIN, log_every=log_every, checkpoint_every=2, most_skips=3)
    bad = range(40)
    with pytest.raises(Diverged, match=r"3 updates of the student in a row .*left out 8 of 8 samples.*xamples 0, "):
        start("rcm", tmp_path, config=config, data=batches(poisoned(*bad), 8, seed=3))
    again = batches(tiny.arrays(), 8, seed=3)
    state, _ = start("rcm", tmp_path, config=dataclasses.replace(config, steps=10), data=again)
    assert int(state.step) == 10 and int(state.student.updates) > 0


def test_optimizer_states_of_the_host_and_checkpoints_beside_the_training_change_no_bit(uninterrupted, tmp_path):
    """Step 20 is being written while its state is donated to step 21."""
    expected, _, expected_dir = uninterrupted("rcm")
    config = dataclasses.replace(TRAIN, offload=True, asynchronous=True)
    start("rcm", tmp_path, config=dataclasses.replace(config, steps=24))
    assert_trees_equal(restored(tmp_path, 20), restored(expected_dir, 20))
    state, _ = start("rcm", tmp_path, config=config)
    assert_trees_equal(state, expected)
    for learner in (state.student, state.fake_score):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(learner.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(learner.params)} == {"device"}


def test_devices_without_the_memory_of_a_host_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "has_host_memory", lambda mesh: False)
    with pytest.raises(ValueError, match=r"train.offload: arrays of cpu cannot .*: set it to False"):
        start("diffusion", tmp_path / "new", config=dataclasses.replace(TRAIN, offload=True))
    assert not (tmp_path / "new").exists()


def test_a_finished_run_does_nothing_more(uninterrupted):
    expected, _, workdir = uninterrupted("diffusion")
    before = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")}
    data = batches(tiny.arrays(), 8, seed=3)
    state, data = start("diffusion", workdir, data=data)
    assert_trees_equal(state, expected)
    assert {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")} == before
    assert steps_of(read_metrics(workdir)) == list(range(5, 41, 5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_came_in_and_the_run_can_go_on(number, uninterrupted, tmp_path):
    expected, _, expected_dir = uninterrupted("diffusion")
    handler = signal.getsignal(number)

    def interrupt(state, step):
        if step == 15:
            os.kill(os.getpid(), number)

    config = dataclasses.replace(TRAIN, sample_every=5)
    with pytest.raises(Interrupted, match=r"stopped at step 1[56]") as stopped:
        start("diffusion", tmp_path, config=config, on_sample=interrupt)
    assert signal.getsignal(number) == handler
    with checkpoint.open_manager(tmp_path) as manager:
        assert manager.latest_step() == stopped.value.step
    assert steps_of(read_metrics(tmp_path))[-1] == stopped.value.step
    state, _ = start("diffusion", tmp_path)
    assert_trees_equal(state, expected)
    assert steps_of(read_metrics(tmp_path))[-5:] == steps_of(read_metrics(expected_dir))[-5:]


def test_only_the_newest_checkpoints_are_kept(uninterrupted, tmp_path):
    config = dataclasses.replace(TRAIN, steps=8, checkpoint_every=2, keep=2)
    start("diffusion", tmp_path, config=config)
    with checkpoint.open_manager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [6, 8]


def test_snapshots_of_all_power_emas_stay_and_are_written_once(tmp_path):
    tracked = dict(ema_tracks=(0.05,))
    config = dataclasses.replace(TRAIN, steps=10, checkpoint_every=2, snapshot_every=4, keep=2)
    expected, _ = start("diffusion", tmp_path, config=config, **tracked)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "snapshots").rglob("*")}
    shutil.rmtree(tmp_path / "checkpoints/10")
    shutil.rmtree(tmp_path / "snapshots/10")  # as if it had been killed at step 9
    state, _ = start("diffusion", tmp_path, config=config, **tracked)
    assert_trees_equal(state, expected)
    files = [p for step in (4, 8) for p in (tmp_path / f"snapshots/{step}").rglob("*")]
    assert files and all(p.stat().st_mtime_ns == before[p] for p in files)
    found = checkpoint.snapshots_of(tmp_path)
    assert found == [(step, step, std) for step in (4, 8, 10) for std in (0.05, 0.1)]  # also where it ends
    for std, tree in ((0.1, state.ema), (0.05, state.tracks[0])):
        params, _ = checkpoint.restore_params(tmp_path, str(std), kind=checkpoint.SNAPSHOTS)
        assert_trees_equal(params, tree)


def test_snapshots_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"snapshot_every 30 must be 0 or a multiple of checkpoint_every 20"):
        dataclasses.replace(TRAIN, snapshot_every=30)
    config = dataclasses.replace(TRAIN, snapshot_every=20)
    with pytest.raises(ValueError, match=r"train.snapshot_every .* ema_half_life .* ema_tracks"):
        start("diffusion", tmp_path / "new", config=config, ema_half_life=100)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"no snapshot in .*: it has no folder snapshots; train.snapshot_every makes"):
        checkpoint.snapshots_of(tmp_path)


def test_samples_are_drawn_every_so_often_and_at_the_end(tmp_path):
    seen = []
    config = dataclasses.replace(TRAIN, steps=7, sample_every=3)
    start("diffusion", tmp_path, config=config, on_sample=lambda state, step: seen.append((step, int(state.step))))
    assert seen == [(3, 3), (6, 6), (7, 7)]


def test_the_averaged_student_alone_can_be_read_from_a_checkpoint(uninterrupted):
    state, _, workdir = uninterrupted("rcm")
    mesh = tiny.one_device()
    abstract = trainer.abstract_params(jax.eval_shape(tiny.boxed_init(), jax.random.key(0)), mesh)
    assert_trees_equal(checkpoint.restore_item(workdir, "ema", abstract), state.ema)
    earlier = checkpoint.restore_item(workdir, "ema", abstract, step=20)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(
        jax.tree.leaves(earlier), jax.tree.leaves(state.ema), strict=True))  # fmt: skip


def test_a_checkpoint_holds_neither_the_teacher_nor_the_step(uninterrupted):
    workdir = uninterrupted("rcm")[2]
    items = {p.name for p in (workdir / "checkpoints" / "40").iterdir() if p.is_dir()}
    assert items == {"student", "ema", "fake_score", "data", "record"}


def test_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(ValueError, match=r"batch size 12 .* 8 devices"):
        start("diffusion", tmp_path / "new", mesh, config=dataclasses.replace(TRAIN, batch_size=12))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "log_every", "checkpoint_every", "sample_every", "keep", "accumulate"]
)
def test_counts_below_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is 0: it must be"):
        dataclasses.replace(TRAIN, **{name: 0})


def test_state_is_placed_with_every_leaf_on_its_devices(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    F, params = tiny.dit()
    state, shardings = tiny.placed(tiny.distillation(F), mesh, params)
    placed = jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, shardings)
    assert all(jax.tree.leaves(placed))
    assert json.dumps(sorted({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)})) == "[8]"
