"""Refreshing what serves: what changed is encoded by the champion's own model, and nothing else moves."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from hllm.errors import ConfigError, DataError, InfraError
from hllm.features import refresh as refreshing
from hllm.features.refresh import refresh
from hllm.features.refreshed import refreshed
from hllm.features.verify import verify
from tests.features.refreshing import (
    DAY,
    catalogue,
    go_on,
    history,
    read_items,
    read_users,
    register,
    serve,
    vectors_of,
)

TODAY = 1_600_000_000 + 3_600 * 200  # the end of the log that the model knows


@pytest.fixture
def served(trained, tmp_path):
    return serve(trained, tmp_path)


def test_only_users_with_other_events_get_new_vectors(served, trained, tiny_source, tmp_path, capsys):
    """Newly active, late, new, with an unknown item; days that were missed; and nothing twice."""
    before = read_users(served, ["u3", "u4", "u5"])
    late = min(second for user, _, second in tiny_source.events if user == "u4") + 1
    events = [
        *tiny_source.events,
        ("u3", "item20", TODAY + 10),
        ("u4", "item21", late),  # reported days after it happened
        ("fresh", "item22", TODAY + 3 * DAY),  # two days without a run in between
        ("fresh", "unheard of", TODAY + 3 * DAY + 1),
    ]
    columns = catalogue(tiny_source)
    for name, value in (("item_id", "unheard of"), ("title", "Not encoded yet"), ("genre", None)):
        columns[name].append(value)
    later = go_on(served, tmp_path / "later", events, **columns)
    # For versions to come: this one reads as far as ever.
    later = later.model_copy(update={"embed": later.embed.model_copy(update={"max_history": 2})})
    refresh(later, "users")
    names = ["u3", "u4", "fresh"]
    read = read_users(served, names)
    kept = [event for event in events if event[1] != "unheard of"]
    expected = vectors_of(trained, [history(kept, name) for name in names])
    assert np.allclose(np.asarray(read["user_vector"]), expected, atol=1e-5)
    assert read["user_events"] == [len(history(kept, name)) for name in names]
    assert set(read["user_model_version"]) == {"1"}
    assert read_users(served, ["u5"])["user_vector"][0] == before["user_vector"][2]
    (done,) = refreshed(later, 1)
    assert done.manifest.rows == {"users": 3}
    assert done.as_of == datetime.fromtimestamp(TODAY + 3 * DAY + 1, UTC)
    capsys.readouterr()
    refresh(later, "users")
    assert "reused, users of version 1" in capsys.readouterr().out
    assert len(refreshed(later, 1)) == 1

    # Point in time: the publication's vector until the refresh could be read, then the refresh's.
    from hllm.features.store import open_store

    moments = [done.available_at - pd.Timedelta(seconds=1), done.available_at]
    frame = pd.DataFrame([("u3", moment) for moment in moments], columns=["user_id", "event_timestamp"])
    features = ["hllm_user_v1:user_vector"]
    then = open_store(served).get_historical_features(entity_df=frame, features=features).to_df()
    then = then.sort_values("event_timestamp")["user_vector"].tolist()
    assert np.array_equal(then[0], before["user_vector"][0])
    assert np.array_equal(then[1], read["user_vector"][0])
    verify(later, "1")
    assert "1 refreshes and back-fills since" in capsys.readouterr().out


def test_new_and_changed_texts_are_encoded_and_read_in_histories(
    served, trained, tiny_source, tmp_path, capsys
):
    from hllm.data.prepared import Prepared
    from hllm.embedding.items import ItemVectors

    columns = catalogue(tiny_source)
    columns["title"][7] = "A title that somebody corrected"
    for name, value in (
        ("item_id", "new one"),
        ("title", columns["title"][10]),
        ("genre", columns["genre"][10]),
    ):
        columns[name].append(value)
    before = read_items(served, ["item7", "item8"])
    events = [*tiny_source.events, ("u6", "new one", TODAY + 5)]
    later = go_on(served, tmp_path / "later", events, **columns)
    refresh(later, "items")
    assert refreshed(later, 1)[0].manifest.rows == {"items": 2}
    read = read_items(served, ["item7", "item8", "new one", "item10"])
    assert read["item_vector"][0] != before["item_vector"][0]
    assert read["item_vector"][1] == before["item_vector"][1]
    # The same text has the same vector, whatever else it is encoded with.
    assert np.allclose(read["item_vector"][2], read["item_vector"][3], atol=1e-6)
    refresh(later, "users")
    assert refreshed(later, 1, "users")[0].manifest.rows == {"users": 1}
    capsys.readouterr()
    refresh(later, "items")
    assert "reused, items of version 1" in capsys.readouterr().out

    # The text goes back to what it was: so does the vector.
    back = go_on(
        served, tmp_path / "back", [*events[:-1], ("u6", "item9", TODAY + 5)], **catalogue(tiny_source)
    )
    refresh(back, "items")
    whole = ItemVectors.open(trained["embed-hllm-1"]).matrix()
    ids = Prepared.open(trained["prepare"]).item_table(["item_id"])["item_id"].to_pylist()
    now = np.asarray(read_items(served, ["item7"])["item_vector"][0], np.float32)
    assert np.allclose(now, whole[ids.index("item7")], atol=1e-5)
    verify(back, "1")


def test_a_killed_refresh_is_finished_before_anything_new(served, tiny_source, tmp_path, monkeypatch, capsys):
    later = go_on(
        served,
        tmp_path / "later",
        [*tiny_source.events, ("u3", "item20", TODAY + 10)],
        **catalogue(tiny_source),
    )
    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "write_offline", _die)
        with pytest.raises(RuntimeError, match="killed"):
            refresh(later, "users")
    assert refreshed(later, 1) == []
    refresh(later, "users")
    assert "finishing v1-users-0001" in capsys.readouterr().out
    assert [one.manifest.rows["users"] for one in refreshed(later, 1)] == [1]
    verify(later, "1")


def test_of_two_runs_at_once_one_wins_and_the_other_says_who(served, tiny_source, tmp_path):
    from hllm.features.publish import export_of
    from hllm.registry.versions import registered_version

    later = go_on(
        served,
        tmp_path / "later",
        [*tiny_source.events, ("u3", "item20", TODAY + 10)],
        **catalogue(tiny_source),
    )
    info = registered_version(later, "1")
    with (
        refreshing.writing(later, info, export_of(later, info)),
        pytest.raises(InfraError, match=r"another process is writing this output: process \d+ on"),
    ):
        refresh(later, "users")


def test_a_promotion_in_the_middle_leaves_both_versions_whole(
    served, trained, tiny_source, tmp_path, monkeypatch, capsys
):
    from hllm.features.publish import publish
    from hllm.registry.promote import promote

    assert register(served, trained) == 2
    publish(served, "2")
    verify(served, "2")
    later = go_on(
        served,
        tmp_path / "later",
        [*tiny_source.events, ("u3", "item20", TODAY + 10)],
        **catalogue(tiny_source),
    )
    real = refreshing.write_offline

    def promoted_meanwhile(*args, **options):
        if options["version"] == 1:
            promote(served, "2", by="a test")
        real(*args, **options)

    monkeypatch.setattr(refreshing, "write_offline", promoted_meanwhile)
    refresh(later, "users")
    assert "version 2 was promoted meanwhile; users of it follow" in capsys.readouterr().out
    for version in (1, 2):
        read = read_users(served, ["u3"], version)
        assert read["user_model_version"] == [str(version)]
        assert read["user_events"] == [len(history(tiny_source.events, "u3")) + 1]
        assert [one.manifest.rows["users"] for one in refreshed(later, version)] == [1]
        verify(later, str(version))


def test_what_cannot_be_refreshed_says_why(served, tiny_source, tmp_path):
    unread = served.model_copy(update={"data": served.data.model_copy(update={"order_starts": 5})})
    with pytest.raises(DataError, match="needs the output of validate"):
        refresh(unread, "users")
    later = go_on(served, tmp_path / "later", tiny_source.events, **catalogue(tiny_source))
    other = later.model_copy(update={"prepare": later.prepare.model_copy(update={"prompt": "Other: "})})
    with pytest.raises(
        ConfigError, match=r"prepare.prompt is Other: , version 1 of hllm was trained with item:"
    ):
        refresh(other, "items")
    nobody = served.model_copy(update={"mlflow": served.mlflow.model_copy(update={"model_name": "unknown"})})
    with pytest.raises(ConfigError, match="no version serves"):
        refresh(nobody, "users")


def _die(*_, **__):
    raise RuntimeError("killed")
