"""Verification reads what ranking models read, and finds every kind of damage."""

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from hllm.errors import DataError
from hllm.features.publish import publish
from hllm.features.verify import verify
from tests.features.world import register, settings_for, tags_of, write_export


@pytest.fixture
def published(tmp_path):
    settings = settings_for(tmp_path)
    version = register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "key"))
    publish(settings, str(version))
    return settings


def test_a_good_publication_is_verified_and_mlflow_resolves_its_service(published, capsys):
    from hllm.features.store import open_store
    from hllm.registry.server import client

    assert "feast.feature_service" not in tags_of(published, 1)
    verify(published, "1")
    assert "60 users and 40 items bit for bit online" in capsys.readouterr().out
    assert tags_of(published, 1)["publication"] == "verified"
    client(published).set_registered_model_alias("hllm", "champion", "1")
    store = open_store(published, mlflow=True)
    assert store.mlflow.resolve_features("models:/hllm/1") == "hllm_v1"
    assert store.mlflow.resolve_features("models:/hllm/champion") == "hllm_v1"


def test_only_a_published_version_is_verified(tmp_path):
    settings = settings_for(tmp_path)
    register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "key"))
    with pytest.raises(DataError, match=r"is not published \(publication = absent\)"):
        verify(settings, "1")


def test_every_kind_of_damage_is_found_and_publishing_again_repairs_it(published, tmp_path):
    good = Path(published.feast.online_url)
    shutil.copy(good, tmp_path / "good.db")
    one_user = "entity_key = (SELECT entity_key FROM {user} LIMIT 1)"
    for damage, says in {
        "UPDATE {item} SET value = {flipped} WHERE rowid = {row}": "item vectors differ from the export",
        "UPDATE {item} SET value = {nan} WHERE rowid = {row}": "item vectors are not finite",
        f"DELETE FROM {{user}} WHERE {one_user}": "user vectors are missing",
        f"UPDATE {{user}} SET value = {{version}} WHERE {one_user} AND feature_name = 'user_model_version'": (
            "do not say model version 1"
        ),
    }.items():
        shutil.copy(tmp_path / "good.db", good)
        _damage(good, damage)
        _set(published, "published")
        with pytest.raises(DataError, match=says):
            verify(published, "1")
        assert tags_of(published, 1)["publication"] != "verified"
        assert "feast.feature_service" not in tags_of(published, 1)
    publish(published, "1")  # not "reused": the version is known to be damaged
    verify(published, "1")
    assert tags_of(published, 1)["publication"] == "verified"


def test_a_truncated_offline_table_is_found(published):
    path = Path(published.feast.offline_path) / "hllm_user_v1.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 59), path)
    with pytest.raises(DataError, match="offline table of users has 59 rows, the export 60"):
        verify(published, "1")


def test_offline_vectors_of_the_wrong_user_are_found(published):
    """Shifted by one row, which no count shows."""
    path = Path(published.feast.offline_path) / "hllm_user_v1.parquet"
    table = parquet.read_table(path)
    ids = table.column("user_id").to_pylist()
    parquet.write_table(table.set_column(0, "user_id", [ids[1:] + ids[:1]]), path)
    with pytest.raises(DataError, match="offline user vectors differ from the export"):
        verify(published, "1")


def _set(settings, publication: str) -> None:
    from hllm.registry.versions import set_tags

    set_tags(settings, 1, {"publication": publication})


def _damage(database: Path, statement: str) -> None:
    from feast.protos.feast.types.Value_pb2 import FloatList, Value

    item, user = '"hllm_hllm_item_v1"', '"hllm_hllm_user_v1"'
    with sqlite3.connect(database) as connection:
        row, value = connection.execute(
            f"SELECT rowid, value FROM {item} WHERE feature_name = 'item_vector' LIMIT 1"
        ).fetchone()
        floats = np.asarray(Value.FromString(value).float_list_val.val, np.float32)
        flipped = (floats.view(np.uint32) ^ np.uint32(1)).view(np.float32)  # the last bit of every number
        broken = floats.copy()
        broken[3] = np.nan
        as_sql = {
            name: f"x'{message.SerializeToString().hex()}'"
            for name, message in {
                "flipped": Value(float_list_val=FloatList(val=flipped)),
                "nan": Value(float_list_val=FloatList(val=broken)),
                "version": Value(string_val="2"),
            }.items()
        }
        assert connection.execute(statement.format(item=item, user=user, row=row, **as_sql)).rowcount > 0
