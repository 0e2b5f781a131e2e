"""Publishing to a real SQLite store and a real MLflow registry."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from hllm.errors import ConfigError, DataError
from hllm.features.publish import publication_folder, publish
from tests.features.world import (
    ODD_IDS,
    linked,
    online,
    register,
    settings_for,
    tags_of,
    vectors,
    write_export,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Versions 1 and 2, of different models, side by side."""
    folder = tmp_path_factory.mktemp("published")
    settings = settings_for(folder)
    for seed in (0, 100):
        export = write_export(folder / "root" / "embed-hllm-3" / f"key{seed}", seed=seed)
        publish(settings, str(register(settings, export)))
    return settings


def test_online_vectors_are_the_exported_bits_in_both_versions(published):
    pairs = [(name, name) for name in ODD_IDS] + [("u50", "i30")]
    rows = [*range(len(ODD_IDS)), 50]
    for version, seed in ((1, 0), (2, 100)):
        read = online(published, version, pairs)
        users = vectors(60, seed)[rows]
        items = vectors(40, seed + 1)[[*range(len(ODD_IDS)), 30]]
        assert np.array_equal(
            np.asarray(read["user_vector"], np.float32).view(np.uint32), users.view(np.uint32)
        )
        assert np.array_equal(
            np.asarray(read["item_vector"], np.float32).view(np.uint32), items.view(np.uint32)
        )
        assert set(read["user_model_version"]) == set(read["item_model_version"]) == {str(version)}
        assert read["user_events"] == rows
        assert read["user_last_event_time"] == [1_000_000_000 + row for row in rows]
        assert read["affinity"] == pytest.approx((users * items).sum(1).tolist(), abs=1e-6)


def test_unknown_ids_read_as_null_and_have_no_affinity(published):
    read = online(published, 1, [("nobody", "i30"), ("u50", "nothing"), ("nobody", "nothing")])
    assert read["user_vector"][0] is None
    assert read["user_model_version"][0] is None
    assert read["item_vector"][0] is not None
    assert read["item_vector"][1] is None
    assert read["affinity"] == [None, None, None]


def test_affinity_of_vectors_of_different_model_versions_is_null(published):
    from hllm.features.store import open_store
    from hllm.features.views import affinity_view

    store = open_store(published)
    mixed = affinity_view(
        "mixed", store.get_feature_view("hllm_user_v1"), store.get_feature_view("hllm_item_v2"), {}
    )
    store.apply([mixed])
    names = ["mixed:affinity", "hllm_user_v1:user_model_version", "hllm_item_v2:item_model_version"]
    read = store.get_online_features(
        features=names, entity_rows=[{"user_id": "u50", "item_id": "i30"}]
    ).to_dict()
    assert (read["user_model_version"], read["item_model_version"]) == (["1"], ["2"])
    assert read["affinity"] == [None]


def test_nothing_of_an_earlier_version_is_touched(published):
    from hllm.features.store import open_store

    store = open_store(published)
    one, two = store.get_feature_service("hllm_v1"), store.get_feature_service("hllm_v2")
    assert one.tags["export"] != two.tags["export"]
    assert {projection.name for projection in one.feature_view_projections} == {
        "hllm_user_v1",
        "hllm_item_v1",
        "hllm_affinity_v1",
    }
    assert one.last_updated_timestamp <= two.created_timestamp


def test_training_rows_see_a_vector_only_from_its_publication_on(published):
    import pandas as pd

    from hllm.features.store import open_store

    store = open_store(published)
    service = store.get_feature_service("hllm_v1")
    there = pd.Timestamp(service.tags["available_at"])
    early = there - pd.Timedelta(seconds=1)
    # One request with two candidates in one second: Feast's default file store would keep only one of them.
    frame = pd.DataFrame(
        [("u50", "i30", there), ("u50", "i31", there), ("u50", "i30", early), ("nobody", "i30", there)],
        columns=["user_id", "item_id", "event_timestamp"],
    )
    read = store.get_historical_features(entity_df=frame, features=service).to_arrow().to_pylist()
    at = {(row["user_id"], row["item_id"], pd.Timestamp(row["event_timestamp"])): row for row in read}
    assert len(read) == len(at) == 4
    found = at["u50", "i31", there]
    assert np.array_equal(np.asarray(found["user_vector"], np.float32), vectors(60, 0)[50])
    assert np.array_equal(np.asarray(found["item_vector"], np.float32), vectors(40, 1)[31])
    assert found["affinity"] == pytest.approx(float(vectors(60, 0)[50] @ vectors(40, 1)[31]), abs=1e-6)
    assert at["u50", "i30", early]["user_vector"] is None
    assert at["u50", "i30", early]["item_vector"] is None
    assert at["nobody", "i30", there]["user_vector"] is None
    assert at["nobody", "i30", there]["item_vector"] is not None


def test_publishing_again_reuses_and_says_so(published, capsys):
    before = Path(published.feast.registry).read_bytes(), _rows(published.feast.online_url)
    publish(published, "1")
    assert "reused, version 1" in capsys.readouterr().out
    assert (Path(published.feast.registry).read_bytes(), _rows(published.feast.online_url)) == before
    assert tags_of(published, 1)["publication"] == "published"


def test_the_registry_holds_the_affinity_as_text_and_no_pickle(published):
    from feast.protos.feast.core.Registry_pb2 import Registry

    registry = Registry.FromString(Path(published.feast.registry).read_bytes())
    functions = [
        view.spec.feature_transformation.user_defined_function for view in registry.on_demand_feature_views
    ]
    assert functions
    assert all(function.body == b"" for function in functions)
    assert all(function.body_text.startswith("def affinity(") for function in functions)


def test_a_version_is_never_overwritten_by_other_data(published):
    from hllm.registry.versions import set_tags

    other = write_export(Path(published.run.root) / "embed-hllm-3" / "other", seed=7)
    first = tags_of(published, 1)["export"]
    set_tags(published, 1, {"export": str(other)})
    with pytest.raises(DataError, match="already holds the vectors of another export"):
        publish(published, "1")
    set_tags(published, 1, {"export": first, "publication": "published"})


def test_a_feast_project_belongs_to_one_registered_model(published):
    other = published.model_copy(
        update={"mlflow": published.mlflow.model_copy(update={"model_name": "another"})}
    )
    version = register(other, Path(published.run.root) / "embed-hllm-3" / "key0")
    with pytest.raises(
        ConfigError, match="hllm_user_v1 belongs to the registered model hllm, not to another"
    ):
        publish(other, str(version))


def test_projects_that_share_their_stores_do_not_touch_each_other(tmp_path):
    from hllm.features.verify import verify

    both = []
    for project in ("shop", "books"):
        settings = settings_for(tmp_path, project=project)
        settings = settings.model_copy(
            update={
                "run": settings.run.model_copy(update={"root": str(tmp_path / project)}),
                "mlflow": settings.mlflow.model_copy(update={"model_name": project}),
            }
        )
        export = write_export(tmp_path / project / "embed-hllm-3" / "key", seed=len(project))
        assert register(settings, export) == 1
        publish(settings, "1")
        both.append(settings)
    for settings in both:
        verify(settings, "1")


def test_a_vector_that_is_not_finite_is_never_published(tmp_path):
    def spoil(users, items):
        users[33, 2] = np.nan

    settings = settings_for(tmp_path)
    version = register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "bad", spoil=spoil))
    with pytest.raises(DataError, match=r"user vectors are not finite.*u33"):
        publish(settings, str(version))
    assert tags_of(settings, version)["publication"] == "publishing"


def test_killed_in_the_middle_then_again_equals_an_uninterrupted_publication(tmp_path):
    export = write_export(tmp_path / "root" / "embed-hllm-3" / "key", users=400)
    settings = settings_for(tmp_path, write_batch_rows=10)
    version = register(settings, export)
    progress = publication_folder(settings, version) / "progress.json"
    _publish_and_kill(settings, version, progress, after_rows=30)
    killed = _rows(settings.feast.online_url)
    assert 30 <= len(killed) // 4 < 400

    publish(settings, str(version))
    whole = settings_for(
        tmp_path,
        registry=str(tmp_path / "b/registry.db"),
        online_url=str(tmp_path / "b/online.db"),
        offline_path=str(tmp_path / "b/offline"),
    )
    whole = whole.model_copy(update={"run": whole.run.model_copy(update={"root": str(tmp_path / "whole")})})
    from hllm.registry.versions import set_tags

    set_tags(settings, version, {"publication": "absent", "export": str(linked(whole, export))})
    publish(whole, str(version))
    assert _rows(settings.feast.online_url) == _rows(whole.feast.online_url)
    for name in ("hllm_user_v1", "hllm_item_v1"):
        one, two = (
            parquet.read_table(f"{place.feast.offline_path}/hllm_{name}.parquet")
            for place in (settings, whole)
        )
        columns = [column for column in one.column_names if column not in ("event_timestamp", "created")]
        assert one.select(columns).equals(two.select(columns))
    assert not progress.exists()


def _publish_and_kill(settings, version: int, progress: Path, after_rows: int) -> None:
    """The real command in its own process, ended by SIGKILL once it has written that many rows."""
    code = (
        "import sys; from hllm.settings import Settings; from hllm.features.publish import publish;"
        "from hllm.features import online; real = online.messages;"
        # Slower by 20 ms a batch, so that the signal finds it in the middle.
        "import time; online.messages = lambda *a: (time.sleep(0.02), real(*a))[1];"
        "publish(Settings.model_validate_json(sys.argv[1]), sys.argv[2])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, settings.model_dump_json(), str(version)], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            text = progress.read_text() if progress.exists() else ""
            if f'"user": {after_rows}' in text or (
                '"user"' in text and int(text.split('"user": ')[1].split(",")[0].rstrip("}")) >= after_rows
            ):
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def _rows(database: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        tables = [
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
            )
        ]
        return [
            (table, *row)
            for table in tables
            for row in connection.execute(
                f'SELECT entity_key, feature_name, value FROM "{table}" ORDER BY 1, 2'
            )
        ]
