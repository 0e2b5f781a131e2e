"""Verification reads what ranking models read, and finds every kind of damage."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from hllm.errors import ConfigError, DataError, InfraError
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
    from hllm.work.mlflow import client

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
        f"DELETE FROM {{user}} WHERE {one_user}": r"user vectors are missing or not 8 wide \(1 of 60\)",
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
    path = Path(published.feast.offline_path) / "hllm_hllm_user_v1.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 59), path)
    with pytest.raises(DataError, match="offline table of users has 59 rows, the export 60"):
        verify(published, "1")


def test_offline_vectors_of_the_wrong_user_are_found(published):
    """Shifted by one row, which no count shows."""
    path = Path(published.feast.offline_path) / "hllm_hllm_user_v1.parquet"
    table = parquet.read_table(path)
    ids = table.column("user_id").to_pylist()
    parquet.write_table(table.set_column(0, "user_id", [ids[1:] + ids[:1]]), path)
    with pytest.raises(DataError, match="offline user vectors differ from the export"):
        verify(published, "1")


@pytest.fixture
def champion(published):
    from hllm.registry.promote import promote

    verify(published, "1")
    promote(published, "1", by="a test")
    return published


def _serves(settings) -> bool:
    from hllm.registry.versions import serving_version

    serving = serving_version(settings)
    return serving is not None and serving.version == 1


def _changed(settings, **feast):
    return settings.model_copy(update={"feast": settings.feast.model_copy(update=feast)})


def test_other_settings_do_not_take_the_champion_down(champion, tmp_path):
    for other in (
        {"registry": str(tmp_path / "other" / "registry.db")},
        {"online_url": str(tmp_path / "other" / "online.db")},
        {"project": "another"},
    ):
        with pytest.raises(ConfigError, match=r"published to other stores than those in \[feast\]") as error:
            verify(_changed(champion, **other), "1")
        assert "publish/v1/feature_store.yaml" in str(error.value)
    elsewhere = champion.model_copy(
        update={"run": champion.run.model_copy(update={"root": str(tmp_path / "x")})}
    )
    with pytest.raises(ConfigError, match=r"was made under .*/root, not under run\.root = .*/x"):
        verify(elsewhere, "1")
    assert _serves(champion)


def test_an_export_or_a_registry_that_is_gone_does_not_take_the_champion_down(champion):
    export = Path(tags_of(champion, 1)["export"])
    shard, registry = export / "users-00001.parquet", Path(champion.feast.registry)
    for gone, says in (
        (shard, "users-00001.parquet is not what the step embed-hllm-3 wrote"),
        (export, "has no finished output"),
        (registry, "the Feast registry is gone"),
    ):
        away = gone.rename(gone.with_name("away"))
        with pytest.raises((DataError, InfraError), match=says):
            verify(champion, "1")
        assert _serves(champion), says
        assert not gone.exists()  # nothing is made in its place
        away.rename(gone)
    verify(champion, "1")


def test_a_champion_is_not_published_anywhere_else(champion, tmp_path):
    """Its state would be `publishing` from then on, and nothing would serve."""
    before = tags_of(champion, 1)
    with pytest.raises(ConfigError, match="serves now and is not published again: it was published to other"):
        publish(_changed(champion, online_url=str(tmp_path / "other" / "online.db")), "1")
    (Path(champion.run.root) / "publish" / "v1" / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(ConfigError, match="has no record of its publication") as error:
        publish(champion, "1")
    assert "hllm rollback" in str(error.value)
    assert tags_of(champion, 1) == before
    assert _serves(champion)


def test_a_sample_is_called_a_sample(published, capsys):
    verify(_changed(published, verify_sample=5), "1")
    said = capsys.readouterr().out
    assert " of 60 users and a sample of " in said
    assert " of 40 items bit for bit online" in said


def test_killed_then_again_is_verified(published):
    code = (
        "import os, sys; from hllm.settings import Settings; from hllm.features import verify;"
        "verify.Verification._compare_point_in_time = lambda *_: os.kill(os.getpid(), 9);"
        "verify.verify(Settings.model_validate_json(sys.argv[1]), '1')"
    )
    argv = [sys.executable, "-c", code, published.model_dump_json()]
    assert subprocess.run(argv, timeout=120, check=False).returncode == -9
    assert tags_of(published, 1)["publication"] == "published"
    assert "feast.feature_service" not in tags_of(published, 1)
    verify(published, "1")
    assert tags_of(published, 1)["publication"] == "verified"
    assert _runs_of(published, "verify") == ["KILLED", "FINISHED"]


def test_what_was_found_stands_in_mlflow(published):
    verify(published, "1")
    path = Path(published.feast.offline_path) / "hllm_hllm_user_v1.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 59), path)
    with pytest.raises(DataError):
        verify(published, "1")
    assert _runs_of(published, "publish") == ["FINISHED"]
    assert _runs_of(published, "verify") == ["FINISHED", "FAILED"]


def _runs_of(settings, step: str) -> list[str]:
    from hllm.work.mlflow import client

    registry = client(settings)
    experiment = registry.get_experiment_by_name(settings.run.name)
    runs = registry.search_runs(
        [experiment.experiment_id], f"tags.`hllm.step` = '{step}'", order_by=["attributes.start_time ASC"]
    )
    return [run.info.status for run in runs]


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
