"""The same promises on Redis and PostgreSQL, started as real servers on this machine."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hllm.errors import ConfigError, DataError, InfraError
from hllm.features.export import USER, Export
from hllm.features.offline import count_offline, remove_offline, write_offline
from hllm.features.publish import publication_folder, publish
from hllm.features.store import describe, open_store, service_errors
from hllm.features.verify import verify
from hllm.registry.promote import promote
from hllm.work.objects import delete_objects, list_objects
from tests.features.conftest import SECRET, free_port
from tests.features.world import ODD_IDS, online, register, settings_for, tags_of, vectors, write_export

REPO = Path(__file__).parents[2] / "feature_repo"


def test_redis_serves_the_exported_bits_and_a_lost_user_is_found(guarded_redis, tmp_path):
    settings = settings_for(tmp_path, online="redis", online_url=guarded_redis.place)
    _publish_two_versions(settings, tmp_path)
    yaml = (publication_folder(settings, 1) / "feature_store.yaml").read_text()
    assert "${HLLM_FEAST_PASSWORD}" in yaml
    assert SECRET not in yaml
    connection = guarded_redis.client(password=SECRET)
    connection.delete(next(key for key in connection.scan_iter() if b"user_id" in key and b"u33" in key))
    with pytest.raises(DataError, match=r"user vectors are missing or not 8 wide \(1 of 60\) \(e.g. 'u33'\)"):
        verify(settings, "1")
    publish(settings, "1")
    verify(settings, "1")


def test_postgres_serves_online_offline_and_the_registry(postgres, tmp_path):
    user, _, place = postgres.partition("@")
    folder, _, port_and_database = place.partition(":")
    port = port_and_database.partition("/")[0]
    registry = f"postgresql+psycopg://{user}@/postgres?host={folder}&port={port}"
    settings = settings_for(
        tmp_path,
        online="postgres",
        online_url=postgres,
        offline="postgres",
        offline_path=postgres,
        registry=registry,
    )
    _publish_two_versions(settings, tmp_path)
    _refresh_and_retire_offline(settings, tmp_path)


def _refresh_and_retire_offline(settings, folder) -> None:
    """Rows of a refresh stand beside the publication's, however often they are written."""
    export = Export.open(folder / "root" / "embed-hllm-3" / "key0")
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    options = {"version": 1, "at": at, "scratch": folder, "part": "users-0001"}
    for _ in range(2):
        write_offline(settings, export, USER, **options)
    assert count_offline(settings, USER, 1, at, "users-0001") == 60
    verify(settings, "1")  # the publication's own rows are all there
    assert [remove_offline(settings, USER, 1) for _ in range(2)] == [1, 0]
    assert count_offline(settings, USER, 1, at, "users-0001") == 0


def test_offline_files_in_s3_are_read_and_one_that_is_gone_is_found(s3, tmp_path):
    bucket = s3.bucket("offline-files")
    settings = settings_for(tmp_path, registry=f"{bucket}/registry.db", offline_path=f"{bucket}/feast")
    version = str(register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "key")))
    publish(settings, version)
    verify(settings, version)
    promote(settings, version, by="a test")
    example = [sys.executable, REPO / "read_features.py", "--repo", publication_folder(settings, 1)]
    done = subprocess.run(
        [*example, "--user", "u50", "--items", "i30"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    then = done.stdout.split("offline, hllm_v1:")[1]
    assert [line.count("None") for line in then.splitlines() if "u50" in line] == [0, 4]

    delete_objects(name for name in list_objects(settings.feast.offline_path) if "user_v1" in name)
    frame = pd.DataFrame({"user_id": ["u50"], "event_timestamp": [datetime.now(UTC)]})
    with pytest.raises(InfraError, match="an offline file cannot be read"), service_errors(settings):
        open_store(settings).get_historical_features(frame, ["hllm_user_v1:user_vector"]).to_arrow()
    with pytest.raises(DataError, match="offline table of users has 0 rows, the export 60"):
        verify(settings, version)


def test_a_server_that_does_not_answer_is_an_infra_error(tmp_path):
    settings = settings_for(tmp_path, online="redis", online_url=f"127.0.0.1:{free_port()}")
    version = register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "key"))
    with pytest.raises(InfraError, match="the feature store failed"):
        publish(settings, str(version))
    assert tags_of(settings, version)["publication"] == "absent"


def test_passwords_do_not_belong_into_settings(tmp_path):
    settings = settings_for(tmp_path, registry="postgresql+psycopg://me:secret@db/feast")
    with pytest.raises(ConfigError, match="would end up in logs") as caught:
        describe(settings, "")
    assert "secret" not in str(caught.value)
    for place in ("db:5432", "db/feast", "db:x/feast"):
        with pytest.raises(ConfigError, match="does not name a PostgreSQL database"):
            describe(settings_for(tmp_path, online="postgres", online_url=place), "")


def _publish_two_versions(settings, folder) -> None:
    for seed in (0, 100):
        version = register(settings, write_export(folder / "root" / "embed-hllm-3" / f"key{seed}", seed=seed))
        publish(settings, str(version))
        verify(settings, str(version))
        assert tags_of(settings, version)["feast.feature_service"] == f"hllm_v{version}"
    for version, seed in ((1, 0), (2, 100)):
        read = online(settings, version, [(name, name) for name in ODD_IDS])
        read_vectors = np.asarray(read["user_vector"], np.float32)
        assert np.array_equal(read_vectors.view(np.uint32), vectors(60, seed)[: len(ODD_IDS)].view(np.uint32))
        assert set(read["user_model_version"]) == {str(version)}
