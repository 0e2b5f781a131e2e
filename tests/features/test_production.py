"""The life of two versions on the kinds of servers that production has, read by plain Feast.

Feast's registry in PostgreSQL, online rows in Redis, offline rows and outputs in S3, or offline rows in
PostgreSQL; every server wants its password.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hllm.features.backfill import backfill
from hllm.features.publish import publication_folder, publish
from hllm.features.refresh import refresh
from hllm.features.refreshed import refreshed
from hllm.features.retire import retire
from hllm.features.verify import verify
from hllm.features.watch import watch
from hllm.registry.promote import promote, rollback
from hllm.registry.versions import serving_version
from hllm.settings import Settings
from tests import services, world
from tests.conftest import S3, Trained
from tests.features.refreshing import catalogue, elsewhere, go_on, history, register, vectors_of

TODAY = world.START + 3_600 * 200  # the end of the log that the models know
MONDAY = datetime(2020, 9, 28, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Servers:
    postgres: str
    redis: str


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="hllm-servers-"))
    folder.chmod(0o755)  # of root's tests, PostgreSQL runs as another user
    with services.postgres(folder / "pg", "127.0.0.1") as found, services.redis(folder, "127.0.0.1") as redis:
        yield Servers(f"hllm@{found.host}:{found.port}/feast", redis)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, tiny_source: world.TinySource) -> Trained:
    """Another model of the same data."""
    sets = {"embed.max_history": 12, "run.seed": 2, "model.baselines": []}
    settings = world.tiny_settings(tmp_path_factory.mktemp("another"), tiny_source, **sets)
    names = ["ingest", "validate", "prepare", "train-hllm-1", "embed-hllm-1", "train-hllm-2", "embed-hllm-3"]
    return Trained(settings, {name: world.run_steps(settings, name) for name in names})


@pytest.fixture(params=["s3", "postgres"])
def settings(
    request: pytest.FixtureRequest,
    servers: Servers,
    s3: S3,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """Each in a Feast project of its own: they share the servers."""
    monkeypatch.setenv("HLLM_FEAST_PASSWORD", services.PASSWORD)
    feast = {
        "project": f"on_{request.param}",
        "registry": f"postgresql+psycopg://{servers.postgres}",
        "online": "redis",
        "online_url": servers.redis,
        "offline": "postgres",
        "offline_path": servers.postgres,
    }
    bucket = ""
    if request.param == "s3":
        bucket = s3.bucket("production")
        feast |= {"offline": "file", "offline_path": f"{bucket}/feast"}
    found = elsewhere(trained.settings, tmp_path, **feast)
    return _with(found, "run", root=f"{bucket}/runs") if bucket else found


@pytest.mark.slow
def test_the_life_of_two_versions(
    settings: Settings, trained: Trained, another: Trained, tiny_source: world.TinySource, tmp_path: Path
) -> None:
    # A version serves. Then events come, a text is corrected, an item is new.
    _release(settings, trained)
    columns = catalogue(tiny_source)
    columns["title"][7] = "A title that somebody corrected"
    for name, value in (("item_id", "new one"), ("title", "Brand new"), ("genre", "heist")):
        columns[name].append(value)
    events = [*tiny_source.events, ("u3", "new one", TODAY + 10), ("fresh", "item20", TODAY + 20)]
    before = _online(settings, 1, [("u3", "item7"), ("u4", "item8")])
    later = go_on(settings, tmp_path / "later", events, **columns)
    for kind in ("items", "users"):
        refresh(later, kind)
    assert [one.manifest.rows for one in refreshed(later, 1)] == [{"items": 2}, {"users": 2}]
    backfill(later, "2020-09-28", "2020-09-28")
    verify(later, "1")
    watch(later)

    now = _online(settings, 1, [("u3", "item7"), ("u4", "item8"), ("fresh", "new one"), ("nobody", "item8")])
    assert not np.allclose(now["user_vector"][0], before["user_vector"][0])
    assert not np.allclose(now["item_vector"][0], before["item_vector"][0])
    assert [now[f"{kind}_vector"][1] for kind in ("user", "item")] == [
        before[f"{kind}_vector"][1] for kind in ("user", "item")
    ]
    assert now["user_events"][:3] == [len(history(events, user)) for user in ("u3", "u4", "fresh")]
    assert now["affinity"][2] == pytest.approx(float(np.dot(now["user_vector"][2], now["item_vector"][2])))
    assert (now["user_vector"][3], now["affinity"][3]) == (None, None)

    # A training row reads what could be read at its moment, and nothing newer.
    items, users = (refreshed(later, 1, kind)[-1].available_at for kind in ("items", "users"))
    opened, past = _opened(settings, 1), MONDAY + timedelta(days=1, minutes=60)
    moments = [past - SECOND, past, opened - SECOND, opened, items - SECOND, items, users - SECOND, users]
    read = _offline(settings, 1, "u3", "item7", moments)
    until_monday = vectors_of(trained, [history(tiny_source.events, "u3")])[0]
    assert read[past - SECOND]["user_vector"] is None
    # The log of that Monday knows u3's event with the new item.
    assert not np.allclose(read[past]["user_vector"], until_monday)
    assert read[opened - SECOND]["user_vector"] == read[past]["user_vector"]
    assert read[opened]["user_vector"] == before["user_vector"][0]
    assert read[users - SECOND]["user_vector"] == before["user_vector"][0]
    assert read[users]["user_vector"] == now["user_vector"][0]
    assert read[items - SECOND]["item_vector"] == before["item_vector"][0]
    assert read[items]["item_vector"] == now["item_vector"][0]
    assert {row["user_model_version"] for row in read.values()} == {None, "1"}

    # Another model follows: its vectors stand beside the first one's, and the two never meet.
    _release(settings, another)
    assert _serving(settings) == 2
    more = [*events, ("u4", "item21", TODAY + 30)]
    newest = go_on(settings, tmp_path / "newest", more, **columns)
    for kind in ("items", "users"):
        refresh(newest, kind)
    assert [one.manifest.rows for one in refreshed(newest, 2)] == [{"items": 2}, {"users": 3}]
    watch(_with(newest, "watch", min_agreement=-1))
    for version, model in ((1, trained), (2, another)):
        verify(newest, str(version))
        found = _online(settings, version, [("u4", "item8")])
        assert found["user_model_version"] == found["item_model_version"] == [str(version)]
        seen = history(more if version == 2 else events, "u4")
        assert np.allclose(found["user_vector"][0], vectors_of(model, [seen])[0], atol=1e-5)
    assert _online(settings, 1, [("u3", "item7")])["user_vector"] == now["user_vector"][:1]
    opened = _opened(settings, 2)
    second = _offline(settings, 2, "u3", "item7", [opened - SECOND, opened])
    assert second[opened - SECOND]["user_vector"] is None
    assert second[opened]["user_model_version"] == "2"
    assert _offline(settings, 1, "u3", "item7", [users, opened])[opened] == read[users]
    _assert_mixed_affinity_is_null(settings)

    # Back to the first, which has missed a day: the next refresh catches up.
    rollback(settings, by="a test", note="worse")
    assert _serving(settings) == 1
    refresh(newest, "users")
    assert _online(settings, 1, [("u4", "item8")])["user_events"] == [len(history(more, "u4"))]

    # Three more versions: of the first one nothing is left, of the others everything.
    for model in (another, trained, another):
        _release(settings, model)
    assert retire(settings, by="a test") == [1, 2]
    for version in (3, 4, 5):
        verify(settings, str(version))
        assert _online(settings, version, [("u4", "item8")])["affinity"] != [None]
    names = {service.name for service in _plain(settings, 5).list_feature_services()}
    assert names == {"hllm_v3", "hllm_v4", "hllm_v5"}
    assert _left_of(settings, 1) == []
    assert _left_of(settings, 5) != []
    publish(settings, "1")  # what it takes to bring one back is all there
    verify(settings, "1")


def _release(settings: Settings, model: Trained) -> None:
    version = str(register(settings, model))
    publish(settings, version)
    verify(settings, version)
    promote(settings, version, by="a test")


def _with(settings: Settings, section: str, **values: Any) -> Settings:
    return settings.model_copy(update={section: settings.at(section).model_copy(update=values)})


def _serving(settings: Settings) -> int | None:
    found = serving_version(settings)
    return found and found.version


def _plain(settings: Settings, version: int) -> Any:
    """Feast by itself, with the file that the publication has written."""
    from feast import FeatureStore

    file = publication_folder(settings, version) / "feature_store.yaml"
    assert services.PASSWORD not in file.read_text()
    return FeatureStore(fs_yaml_file=file)


def _online(settings: Settings, version: int, pairs: list[tuple[str, str]]) -> dict[str, list[Any]]:
    store = _plain(settings, version)
    rows = [{"user_id": user, "item_id": item} for user, item in pairs]
    service = store.get_feature_service(f"hllm_v{version}")
    return store.get_online_features(features=service, entity_rows=rows).to_dict()


def _offline(
    settings: Settings, version: int, user: str, item: str, moments: list[datetime]
) -> dict[datetime, dict[str, Any]]:
    store = _plain(settings, version)
    frame = pd.DataFrame({"user_id": user, "item_id": item, "event_timestamp": moments})
    service = store.get_feature_service(f"hllm_v{version}")
    read = store.get_historical_features(entity_df=frame, features=service).to_arrow().to_pylist()
    assert len(read) == len(moments)
    return {row.pop("event_timestamp").replace(tzinfo=UTC): row for row in read}


def _opened(settings: Settings, version: int) -> datetime:
    """The moment from which a version could be read."""
    service = _plain(settings, version).get_feature_service(f"hllm_v{version}")
    return datetime.fromisoformat(service.tags["available_at"])


def _assert_mixed_affinity_is_null(settings: Settings) -> None:
    """Somebody puts the user of one version beside the item of another."""
    from hllm.features.store import open_store
    from hllm.features.views import affinity_view

    store = open_store(settings)
    users, items = store.get_feature_view("hllm_user_v1"), store.get_feature_view("hllm_item_v2")
    mixed = affinity_view("mixed", users, items, {})
    store.apply([mixed])
    names = ["mixed:affinity", "hllm_user_v1:user_model_version", "hllm_item_v2:item_model_version"]
    ids = {"user_id": "u4", "item_id": "item8"}
    online = store.get_online_features(features=names, entity_rows=[ids]).to_dict()
    frame = pd.DataFrame([{**ids, "event_timestamp": datetime.now(UTC) + timedelta(minutes=1)}])
    offline = store.get_historical_features(entity_df=frame, features=names).to_arrow().to_pydict()
    for read in (online, offline):
        assert (read["user_model_version"], read["item_model_version"]) == (["1"], ["2"])
        assert read["affinity"] == [None]
    store.apply([], objects_to_delete=[mixed], partial=False)


def _left_of(settings: Settings, version: int) -> list[str]:
    """What is in Redis and in the offline store of a version, asked of the servers themselves."""
    from hllm.features.store import connect_postgres
    from hllm.features.stores.redis import connect
    from hllm.work.objects import list_objects

    redis, project = connect(settings), settings.feast.project
    fields = [f"_ts:hllm_{kind}_v{version}" for kind in ("user", "item")]
    keys = [key for key in redis.scan_iter() if project.encode() in key and redis.type(key) == b"hash"]
    found = [repr(key) for key in keys if any(redis.hmget(key, fields))]
    if settings.feast.offline == "file":
        return found + [name for name in list_objects(settings.feast.offline_path) if f"_v{version}." in name]
    with connect_postgres(settings, "feast.offline_path") as connection:
        asked = "SELECT tablename FROM pg_tables WHERE tablename ~ %s"
        return found + [
            name for (name,) in connection.execute(asked, (f"^{project}_hllm_.*_v{version}_offline",))
        ]
