"""The stream of training batches and its position."""

import itertools

import numpy as np
import pytest

from rcm_jax.data.dataset import Dataset, Examples, batches

ARRAYS = {"x0": np.arange(20.0).reshape(10, 2), "cond": {"label": np.arange(10)}}


def labels(iterator, n):
    return [batch["cond"]["label"].tolist() for batch in itertools.islice(iterator, n)]


def test_batches_hold_matching_rows_of_every_array():
    batch = next(batches(ARRAYS, 4, seed=0))
    assert batch["x0"].shape == (4, 2)
    np.testing.assert_array_equal(batch["x0"], ARRAYS["x0"][batch["cond"]["label"]])


def test_a_batch_says_where_all_its_examples_stand_whatever_rows_of_it_are_read():
    whole, part = batches(ARRAYS, 4, seed=0), batches(ARRAYS, 4, seed=0, rows=np.array([1, 2]))
    for _ in range(5):
        a, b = next(whole), next(part)
        np.testing.assert_array_equal(a["index"], a["cond"]["label"])
        np.testing.assert_array_equal(a["index"], b["index"])
        np.testing.assert_array_equal(b["cond"]["label"], a["index"][1:3])


def test_an_example_left_out_gives_its_turn_to_the_next_one_that_is_not():
    plain, left_out = (labels(batches(ARRAYS, 5, seed=0, leave_out=out), 4) for out in ((), (2, 3, 9)))
    instead = {2: 4, 3: 4, 9: 0}
    assert left_out == [[instead.get(i, i) for i in batch] for batch in plain]


@pytest.mark.parametrize(("out", "words"), [((10,), "example 10, but the data have 10"), (range(10), "all 10")])
def test_examples_that_are_not_there_or_all_that_are_cannot_be_left_out(out, words):
    with pytest.raises(ValueError, match=words):
        batches(ARRAYS, 4, seed=0, leave_out=out)


def test_every_epoch_is_a_new_permutation_and_no_example_is_dropped():
    stream = list(itertools.chain(*labels(batches(ARRAYS, 4, seed=0), 10)))  # four epochs of ten
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order():
    assert labels(batches(ARRAYS, 4, seed=0), 5) == labels(batches(ARRAYS, 4, seed=0), 5)
    assert labels(batches(ARRAYS, 4, seed=0), 5) != labels(batches(ARRAYS, 4, seed=1), 5)


@pytest.mark.smoke
@pytest.mark.parametrize("consumed", [0, 1, 3, 7])
def test_a_restored_position_goes_on_with_the_next_batch_whatever_was_prefetched(consumed):
    whole = labels(batches(ARRAYS, 4, seed=0), 12)
    first = batches(ARRAYS, 4, seed=0)
    labels(first, consumed)
    position = first.get_state()
    again = batches(ARRAYS, 4, seed=0)
    labels(again, 2)  # its own position is replaced
    again.set_state(position)
    assert labels(again, 12 - consumed) == whole[consumed:]


def test_a_random_access_source_gives_the_same_stream_as_its_arrays():
    assert labels(batches(Examples(ARRAYS), 4, seed=0), 12) == labels(batches(ARRAYS, 4, seed=0), 12)


def test_the_stream_of_a_seed_stays_what_it_was():
    assert labels(batches(ARRAYS, 4, seed=0), 3) == [[1, 2, 4, 5], [9, 7, 8, 6], [0, 3, 9, 6]]


@pytest.mark.parametrize("train", [ARRAYS, Examples(ARRAYS)], ids=["arrays", "source"])
def test_the_sample_shape_is_known_of_either_kind(train):
    assert Dataset(train, None, {}, None, "video").sample_shape == (2,)


def test_a_batch_larger_than_the_data_spans_epochs():
    assert sorted(labels(batches(ARRAYS, 20, seed=0), 1)[0]) == sorted([*range(10), *range(10)])


def test_batch_size_below_one_is_refused_with_its_number():
    with pytest.raises(ValueError, match="batch size 0"):
        batches(ARRAYS, 0, seed=0)
