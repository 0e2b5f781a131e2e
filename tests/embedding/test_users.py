"""A user's vector depends on the user's own last events, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from hllm.data.prepared import Prepared
from hllm.embedding.histories import Histories
from hllm.embedding.items import ItemVectors
from hllm.embedding.users import held_out_user_vectors, vectors_of_histories
from hllm.models.common.history import UNKNOWN_TIME
from hllm.models.load import load_user_model
from tests.conftest import Trained

UNKNOWN_TIMES = np.full(100, UNKNOWN_TIME)
MODELS = [("train-hllm-2", "embed-hllm-1"), ("train-sasrec-1", "embed-sasrec-1")]


@pytest.fixture(params=MODELS, ids=["hllm", "sasrec"])
def parts(request: pytest.FixtureRequest, trained: Trained):
    train, embed = request.param
    return load_user_model(trained[train]), ItemVectors.open(trained[embed]).matrix()


@pytest.fixture
def prepared(trained: Trained) -> Prepared:
    return Prepared.open(trained["prepare"])


def test_a_vector_is_the_same_alone_and_in_any_company(parts, prepared: Prepared):
    model, items = parts
    users, ends = prepared.held_out("test")
    asked = prepared.event_times[ends]
    together = held_out_user_vectors(model, items, prepared, users, ends, asked, 50, 256)
    done: list[int] = []
    few = held_out_user_vectors(model, items, prepared, users, ends, asked, 50, 3, done.append)
    backwards = held_out_user_vectors(model, items, prepared, users[::-1], ends[::-1], asked[::-1], 50, 5)[
        ::-1
    ]
    assert len(done) > 1
    assert sum(done) == len(users)  # what the progress line counts
    np.testing.assert_allclose(few, together, atol=1e-5)
    np.testing.assert_allclose(backwards, together, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_vector_sees_the_events_before_its_position_and_no_other(parts, prepared: Prepared):
    model, items = parts
    user = int(np.argmax(np.diff(prepared.user_offsets)))
    start, end = (int(offset) for offset in prepared.user_offsets[user : user + 2])
    position, most = end - 3, 6
    asked = np.array(prepared.event_times[[position]])
    before = held_out_user_vectors(
        model, items, prepared, np.array([user]), np.array([position]), asked, most, 1
    )

    def with_changed(event: int) -> np.ndarray:
        events = np.array(prepared.event_items)
        events[event] = (events[event] + 1) % len(items)
        return vectors_of_histories(
            model,
            items,
            Histories(events, prepared.event_times, np.array([position - most]), np.array([most]), asked),
            1,
        )

    assert position - most - 1 >= start
    for unseen in (position - most - 1, position, position + 1):
        np.testing.assert_array_equal(with_changed(unseen), before)
    for seen in range(position - most, position):
        assert np.abs(with_changed(seen) - before).max() > 1e-6


def test_the_order_of_events_matters(parts):
    model, items = parts
    events = np.array([1, 2, 3, 4, 4, 3, 2, 1])
    histories = Histories(events, UNKNOWN_TIMES, np.array([0, 4]), np.array([4, 4]), UNKNOWN_TIMES[:2])
    there, back = vectors_of_histories(model, items, histories, 2)
    assert np.abs(there - back).max() > 1e-4


def test_a_history_longer_than_sasrec_was_trained_on_counts_by_its_last_events(trained: Trained):
    model = load_user_model(trained["train-sasrec-1"])
    items = ItemVectors.open(trained["embed-sasrec-1"]).matrix()
    known = trained.settings.sasrec.stage1.history_length
    events = np.arange(3 * known) % len(items)
    starts, lengths = np.array([0, 2 * known]), np.array([3 * known, known])
    whole, last = vectors_of_histories(
        model, items, Histories(events, UNKNOWN_TIMES, starts, lengths, UNKNOWN_TIMES[:2]), 2
    )
    np.testing.assert_allclose(whole, last, atol=1e-6)


def test_an_empty_history_is_a_mistake_and_not_its_neighbours_vector(parts):
    model, items = parts
    starts, lengths = np.array([0, 3, 3]), np.array([3, 0, 4])
    with pytest.raises(ValueError, match="never empty"):
        vectors_of_histories(
            model, items, Histories(np.arange(9), UNKNOWN_TIMES, starts, lengths, UNKNOWN_TIMES[:3]), 2
        )


def test_a_history_asked_about_at_many_moments_is_encoded_once(trained: Trained, prepared: Prepared):
    """A temporal split asks about a user's every event of the test period."""
    model = load_user_model(trained["train-hllm-2"])
    items = ItemVectors.open(trained["embed-hllm-1"]).matrix()
    user = int(np.argmax(np.diff(prepared.user_offsets)))
    start, end = (int(offset) for offset in prepared.user_offsets[user : user + 2])
    ends = np.arange(start + 1, end)[::-1]
    asked = np.array(prepared.event_times[ends])
    computed: list[int] = []
    hook = model.decoder.norm.register_forward_hook(lambda *call: computed.append(call[1][0].shape[1]))
    users = np.full(len(ends), user)
    together = held_out_user_vectors(model, items, prepared, users, ends, asked, 50, 256)
    hook.remove()
    assert computed == [end - 1 - start]
    alone = [
        held_out_user_vectors(model, items, prepared, users[:1], ends[[row]], asked[[row]], 50, 1)
        for row in range(len(ends))
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    assert len(ends) > 15
