"""Past days for ranking models: honest event times, and the days that the model was trained on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hllm.errors import ConfigError
from hllm.features.backfill import backfill
from hllm.features.export import ITEM, USER, Vectors
from hllm.features.offline import write_offline
from hllm.features.publish import publish
from hllm.features.refreshed import refreshed
from hllm.features.verify import verify
from tests.features.refreshing import DAY, catalogue, go_on, history, read_users, serve, vectors_of
from tests.features.world import register, settings_for, vectors, write_export

MONDAY = datetime(2020, 9, 28, tzinfo=UTC)  # after the last event that trained the model


def test_days_read_as_a_daily_refresh_would_have_left_them(trained, tiny_source, tmp_path, capsys):
    from hllm.features.store import open_store

    served = serve(trained, tmp_path)
    monday = int(MONDAY.timestamp())
    events = [
        *tiny_source.events,
        ("u3", "item20", monday + 3_600),
        ("u4", "item21", monday + DAY + 3_600),
    ]
    later = go_on(served, tmp_path / "later", events, **catalogue(tiny_source))
    online = read_users(served, ["u3", "u4"])
    backfill(later, "2020-09-28", "2020-09-29")
    records = refreshed(later, 1, "backfill")
    assert [one.manifest.rows for one in records] == [{"users": 40, "items": 60}, {"users": 1, "items": 0}]
    assert [one.available_at for one in records] == [
        MONDAY + timedelta(days=day, minutes=60) for day in (1, 2)
    ]
    assert read_users(served, ["u3", "u4"]) == online

    asked = [
        (user, "item20", MONDAY + timedelta(days=days, minutes=minutes))
        for user in ("u3", "u4")
        for days, minutes in ((1, 59), (1, 60), (2, 61))
    ]
    store = open_store(served)
    frame = pd.DataFrame(asked, columns=["user_id", "item_id", "event_timestamp"])
    read = store.get_historical_features(
        entity_df=frame, features=store.get_feature_service("hllm_v1")
    ).to_df()
    found = {(row.user_id, pd.Timestamp(row.event_timestamp)): row for row in read.itertuples()}
    for user in ("u3", "u4"):
        early, first, second = (found[user, pd.Timestamp(when)] for name, _, when in asked if name == user)
        assert early.user_vector is None
        assert early.item_vector is None
        for row, end in ((first, monday + DAY), (second, monday + 2 * DAY)):
            known = [event for event in events if event[2] < end]
            expected = vectors_of(trained, [history(known, user)])[0]
            assert np.allclose(row.user_vector, expected, atol=1e-5)
            assert row.affinity == pytest.approx(float(np.dot(row.user_vector, row.item_vector)), abs=1e-5)
    capsys.readouterr()
    backfill(later, "2020-09-28", "2020-09-29")
    assert capsys.readouterr().out.count("reused") == 2
    verify(later, "1")

    with pytest.raises(
        ConfigError, match=r"(?s)could be read from 20.* on \(1 of 1\).*its real vectors are there"
    ):
        backfill(later, *2 * [datetime.now(UTC).date().isoformat()])
    with pytest.raises(ConfigError, match=r"has learned from events until 2020-09-2.* \(2 of 2\)"):
        backfill(later, "2020-09-15", "2020-09-16")
    backfill(later, "2020-09-15", "2020-09-15", inside_training=True)
    assert "INSIDE the model's training window" in capsys.readouterr().out
    marked = refreshed(later, 1, "backfill")[0]
    assert marked.manifest.facts["inside_training"]
    assert marked.part == "backfill-2020-09-15-inside-training"
    tags = open_store(served).get_feature_service("hllm_v1").tags
    assert "2020-09-2" in tags["leaks_until"]
    for first, last, says in (
        ("yesterday", "2020-09-15", "is not a day"),
        ("2020-09-16", "2020-09-15", "lies after --to"),
    ):
        with pytest.raises(ConfigError, match=says):
            backfill(later, first, last)


class Days:
    """Users whose interest is another every day; what they choose tells that day's interest, nothing else."""

    USERS, ITEMS, DAYS = 60, 40, 6

    def __init__(self, folder) -> None:
        self.folder, self.settings = folder, settings_for(folder)
        export = write_export(folder / "root" / "embed-hllm-3" / "key", self.USERS, self.ITEMS)
        publish(self.settings, str(register(self.settings, export)))
        self.users = Vectors(export, 8)
        self.names = [name for batch in self.users.batches(USER, 100) for name in batch.ids]
        (items,) = self.users.batches(ITEM, 100)
        self.item_names, self.items_ID = items.ids, items.vectors_ND
        self.first = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
        self.interests = [vectors(self.USERS, 100 + day) for day in range(self.DAYS)]
        rows = [
            (self.names[user], self.item_names[item], self.first + timedelta(days=day, hours=6), score > 0)
            for day, interest in enumerate(self.interests)
            for user in range(self.USERS)
            for item, score in list(enumerate(self.items_ID @ interest[user]))[day :: self.DAYS]
        ]
        self.rows = pd.DataFrame(rows, columns=["user_id", "item_id", "event_timestamp", "label"])

    def write(self, vectors_UD, at: datetime, part: str) -> None:
        folder = self.folder / part
        folder.mkdir()
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_UD.reshape(-1)), 8)
        zeros = pa.array([0] * self.USERS, pa.int64())
        columns = {"user_id": self.names, "vector": column, "events": zeros, "last_event_time": zeros}
        parquet.write_table(pa.table(columns), folder / "users-00000.parquet")
        write_offline(self.settings, Vectors(folder, 8), USER, version=1, at=at, scratch=folder, part=part)

    def auc(self, labels) -> float:
        """Of a ranker trained on all days but the last two, asked about those."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score

        from hllm.features.store import open_store

        store = open_store(self.settings)
        service = store.get_feature_service("hllm_v1")
        asked = self.rows.assign(label=labels)
        read = store.get_historical_features(entity_df=asked, features=service).to_df()
        features = read[["affinity"]].to_numpy(float)
        late = (
            pd.to_datetime(read["event_timestamp"]) >= self.first + timedelta(days=self.DAYS - 2)
        ).to_numpy()
        ranker = LogisticRegression().fit(features[~late], read["label"][~late])
        return float(roc_auc_score(read["label"][late], ranker.predict_proba(features[late])[:, 1]))


def test_the_join_catches_leaking_vectors_and_shuffled_labels(tmp_path):
    """800 held-out rows: chance lies within 0.5 +- 0.06 (three standard deviations)."""
    honest, leaking, backdated = (Days(tmp_path / name) for name in ("honest", "leaking", "backdated"))
    for day in range(Days.DAYS):
        begins = honest.first + timedelta(days=day)
        interest = honest.interests[day] + 0.7 * vectors(Days.USERS, 200 + day)
        interest /= np.linalg.norm(interest, axis=1, keepdims=True)
        honest.write(interest.astype(np.float32), begins, f"users-{day:04d}")
        # Vectors that know what the day's rows ask: readable when the day is over, as they are in truth ...
        leaking.write(leaking.interests[day], leaking.first + timedelta(days=day + 1), f"users-{day:04d}")
        # ... or with the day itself as their event time: what the rule about event times prevents.
        backdated.write(backdated.interests[day], backdated.first + timedelta(days=day), f"users-{day:04d}")
    labels = honest.rows["label"].to_numpy()
    assert honest.auc(labels) > 0.7
    assert honest.auc(np.random.default_rng(3).permutation(labels)) == pytest.approx(0.5, abs=0.06)
    assert leaking.auc(leaking.rows["label"].to_numpy()) == pytest.approx(0.5, abs=0.06)
    assert backdated.auc(backdated.rows["label"].to_numpy()) > 0.95
