"""Rows in Redis are Feast's own, byte for byte; and what happens to them when Redis or a publisher fails."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hllm.errors import ConfigError, DataError, InfraError
from hllm.features import publish as publishing
from hllm.features.export import ENTITIES, USER, Export
from hllm.features.online import rows_of
from hllm.features.publish import publication_folder, publish
from hllm.features.stores.messages import messages
from hllm.features.stores.redis import claim, connect
from hllm.features.verify import verify
from hllm.registry.versions import serving_version
from tests.features.conftest import RedisServer
from tests.features.world import ODD_IDS, online, register, settings_for, tags_of, write_export

AT = datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC)


@pytest.fixture
def settings(redis_server, tmp_path):
    return settings_for(tmp_path, online="redis", online_url=redis_server.place)


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "root" / "embed-hllm-3" / "key")


def test_what_is_written_is_what_feast_writes(settings, export, redis_server):
    from hllm.features.store import open_store
    from hllm.features.views import views_of

    store, found = open_store(settings), Export.open(export)
    views, redis = views_of(settings, 7, {}), connect(settings)
    contents = []
    for direct in (True, False):
        redis.flushall()
        for entity in ENTITIES:
            batches = list(found.batches(entity, 16))
            if direct:
                done = list(rows_of(settings, entity, 7).write(redis, iter(batches), 7, AT))
                assert [batch.first for batch in done] == [batch.first for batch in batches]
            else:
                for batch in batches:
                    told = messages(batch, 7, AT)
                    store.provider.online_write_batch(store.config, views.of(entity), told, None)
        contents.append({key: redis.hgetall(key) for key in redis.scan_iter()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 60 + 40
    names = {rows_of(settings, USER, 7).name(key) for key in contents[0]} - {None}
    assert len(names) == 60
    assert names >= set(ODD_IDS)


def test_removing_a_view_leaves_the_other_versions_and_projects(settings, export):
    found, redis = Export.open(export), connect(settings)
    other = settings_for(export, project="xhllm", online="redis", online_url=settings.feast.online_url)
    for place, version in ((settings, 1), (settings, 2), (other, 1)):
        rows = rows_of(place, USER, version)
        list(rows.write(redis, found.batches(USER, 16), version, AT))
    assert rows_of(settings, USER, 1).remove(redis, lambda count: None) == 60
    batch = next(found.batches(USER, 60))
    left = [
        sum(map(bool, rows_of(place, USER, version).vector_lengths(redis, batch.ids)))
        for place, version in ((settings, 1), (settings, 2), (other, 1))
    ]
    assert left == [0, 30, 30]
    assert redis.dbsize() == 120


def test_a_restart_in_the_middle_loses_nothing(settings, export, redis_server, monkeypatch):
    """Redis forgets all it had confirmed; the same command goes on, and writes that again."""
    version = str(register(settings, export))
    _after_batches(monkeypatch, 2, lambda: (redis_server.stop(), redis_server.start()))
    with pytest.raises(InfraError, match="the feature store failed"):
        publish(settings, version)
    assert (publication_folder(settings, 1) / "progress.json").exists()
    assert tags_of(settings, 1)["publication"] == "publishing"
    monkeypatch.undo()
    publish(settings, version)
    verify(settings, version)
    assert online(settings, 1, [("u50", "i30")])["affinity"][0] is not None


def test_a_full_redis_takes_nothing_from_the_champion(tmp_path, export):
    server = RedisServer(tmp_path, "--maxmemory", "64mb", "--maxmemory-policy", "noeviction")
    try:
        settings = settings_for(tmp_path, online="redis", online_url=server.place)
        _serve(settings, export)
        used = server.client().info("memory")["used_memory"]
        server.client().config_set("maxmemory", used + 3_000)
        second = register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "two", seed=5))
        with pytest.raises(InfraError, match=r"is too full: 60 rows need about .* MiB.*\n.*hllm retire"):
            publish(settings, str(second))
        assert tags_of(settings, 2)["publication"] == "absent"
        # Others fill it while we write: no estimate helps, the rows are refused.
        server.client().config_set("maxmemory", 0)
        full = server.client()
        with pytest.MonkeyPatch.context() as patch:
            _after_batches(patch, 2, lambda: full.config_set("maxmemory", 1_000_000))
            with pytest.raises(InfraError, match=r"maxmemory"):
                publish(settings, str(second))
        assert online(settings, 1, [("u50", "i30")])["affinity"][0] is not None
        assert tags_of(settings, 1)["publication"] == "verified"
        full.config_set("maxmemory", 0)
        publish(settings, str(second))
        verify(settings, str(second))
    finally:
        server.stop()


def test_a_redis_that_evicts_any_key_is_refused(tmp_path, export):
    server = RedisServer(tmp_path, "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
    try:
        settings = settings_for(tmp_path, online="redis", online_url=server.place)
        version = register(settings, export)
        with pytest.raises(ConfigError, match=r"maxmemory-policy is allkeys-lru: .* drop vectors"):
            publish(settings, str(version))
    finally:
        server.stop()


def test_of_two_publishers_one_wins_and_the_other_says_who(settings, export):
    """The other is on another machine: no lock file keeps them apart, Redis does."""
    version = register(settings, export)
    with (
        claim(connect(settings), "hllm", version),
        pytest.raises(InfraError, match=r"another publisher is at work: .* on .*, process \d+, since 20"),
    ):
        publish(settings, str(version))
    publish(settings, str(version))
    assert not connect(settings).keys("hllm:publishing*")


def test_the_claim_of_a_publisher_that_was_killed_is_waited_out(settings, export, capsys):
    version = register(settings, export)
    connect(settings).set("hllm:publishing:hllm:v1", "one that was killed", px=1_500)
    publish(settings, str(version))
    assert "version 1: claimed by one that was killed; does it live?" in capsys.readouterr().err
    verify(settings, str(version))


def test_a_publisher_whose_claim_was_taken_over_stops(settings, export, monkeypatch):
    version = register(settings, export)
    redis = connect(settings)
    _after_batches(monkeypatch, 2, lambda: redis.set("hllm:publishing:hllm:v1", "somebody else"))
    with pytest.raises(InfraError, match="another publisher is at work: somebody else"):
        publish(settings, str(version))
    assert redis.get("hllm:publishing:hllm:v1") == b"somebody else"


def test_two_publishers_on_one_machine(settings, export):
    from hllm.work.artifacts import Store

    version = register(settings, export)
    with (
        Store(settings.run.root).lock("publish", f"v{version}"),
        pytest.raises(InfraError, match=r"another process is writing this output: process \d+ on "),
    ):
        publish(settings, str(version))


def test_a_registry_that_moved_on_keeps_both_publications(settings, export, tmp_path, monkeypatch):
    """Version 3 is published whole while version 2 is being written; version 1 serves throughout."""
    from hllm.features.store import open_store

    _serve(settings, export)
    second, third = (
        str(register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / name, seed=seed)))
        for name, seed in (("two", 5), ("three", 7))
    )
    _after_batches(monkeypatch, 2, lambda: publish(settings, third))
    publish(settings, second)
    names = {service.name for service in open_store(settings).list_feature_services()}
    assert names == {"hllm_v1", "hllm_v2", "hllm_v3"}
    assert serving_version(settings).version == 1
    for version in ("1", second, third):
        verify(settings, version)


def test_a_crash_between_publish_and_promote_leaves_the_champion(settings, export, tmp_path):
    from hllm.registry.promote import promote

    _serve(settings, export)
    second = str(register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "two", seed=5)))
    publish(settings, second)
    verify(settings, second)
    assert serving_version(settings).version == 1
    assert online(settings, 1, [("u50", "i30")])["user_model_version"] == ["1"]
    publish(settings, second)  # what a retry of the release does first: reused
    promote(settings, second, by="a test")
    assert serving_version(settings).version == 2


def test_a_corrupted_shard_is_never_published(settings, export):
    _serve(settings, export)
    bad = write_export(export.parent / "bad", seed=5)
    shard = bad / "users-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    version = register(settings, bad)
    with pytest.raises(DataError, match=r"users-00001.parquet is not what the step embed-hllm-3 wrote"):
        publish(settings, str(version))
    assert tags_of(settings, version)["publication"] == "absent"
    redis = connect(settings)
    assert not any(b"v2" in field for key in redis.scan_iter() for field in redis.hkeys(key))
    shard.write_bytes(content[:-20])  # cut off
    with pytest.raises(DataError, match=r"users-00001.parquet is not what"):
        publish(settings, str(version))
    # The champion's own export may rot, too: that is said, and takes nothing from readers.
    (export / "users-00000.parquet").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"users-00000.parquet is not what"):
        verify(settings, "1")
    assert serving_version(settings).version == 1
    assert online(settings, 1, [("u50", "i30")])["user_model_version"] == ["1"]


def _serve(settings, export) -> None:
    from hllm.registry.promote import promote

    version = str(register(settings, export))
    publish(settings, version)
    verify(settings, version)
    promote(settings, version, by="a test")


def _after_batches(monkeypatch, count: int, act) -> None:
    """Do something once, when so many batches are confirmed."""
    real, left = publishing.write_online, [count]

    def write(*args, written, **options):
        def confirmed(rows: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                act()
            written(rows)

        real(*args, written=confirmed, **options)

    monkeypatch.setattr(publishing, "write_online", write)
