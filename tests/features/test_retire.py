"""Old versions go, with everything they published; what serves or may serve again stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from hllm.errors import GateError, InfraError
from hllm.features.export import ENTITIES
from hllm.features.online import publisher, rows_of
from hllm.features.publish import publication_folder, publish
from hllm.features.retire import retire
from hllm.features.stores.redis import connect
from hllm.features.verify import verify
from tests.features.world import online, register, settings_for, tags_of, write_export


@pytest.mark.parametrize("store", ["redis", "sqlite"])
def test_the_champion_and_two_before_it_stay_and_what_is_newer(store, redis_server, tmp_path, capsys):
    from hllm.features.store import open_store
    from hllm.registry.promote import promote, rollback

    place = {"online": "redis", "online_url": redis_server.place} if store == "redis" else {}
    settings = settings_for(tmp_path, **place)
    for number in range(1, 6):
        export = write_export(tmp_path / "root" / "embed-hllm-3" / f"key{number}", seed=10 * number)
        version = str(register(settings, export))
        publish(settings, version)
        if number < 5:
            verify(settings, version)
            promote(settings, version, by="a test")
    capsys.readouterr()
    assert retire(settings, by="a reviewer", note="no room") == [1]
    said = capsys.readouterr().out
    assert "version 1: its service, views, online rows and offline files removed" in said
    tags = tags_of(settings, 1)
    assert tags["publication"] == "retired"
    assert "feast.feature_service" not in tags
    assert (tags["retired_by"], tags["retired_note"]) == ("a reviewer", "no room")

    names = {view.name for view in open_store(settings).list_feature_views()}
    assert names == {f"hllm_{kind}_v{number}" for kind in ("user", "item") for number in range(2, 6)}
    assert {one.name for one in open_store(settings).list_feature_services()} == {
        f"hllm_v{number}" for number in range(2, 6)
    }
    files = {path.name for path in Path(settings.feast.offline_path).iterdir()}
    assert not any("_v1." in name for name in files)
    assert len(files) == 8
    assert not publication_folder(settings, 1).exists()
    if store == "redis":
        redis = connect(settings)
        for entity in ENTITIES:
            fields = {rows_of(settings, entity, 1).time_field, *rows_of(settings, entity, 1).fields.values()}
            assert not any(fields & set(redis.hkeys(key)) for key in redis.scan_iter())
    for number in range(2, 6):
        assert online(settings, number, [("u50", "i30")])["affinity"][0] is not None
    verify(settings, "4")

    with pytest.raises(GateError, match=r"not fully published \(publication = retired\)"):
        rollback(settings, "1")
    assert retire(settings) == []
    assert "nothing to remove" in capsys.readouterr().out
    publish(settings, "1")  # what it takes to bring one back is all there
    verify(settings, "1")


def test_a_retirement_that_was_killed_is_finished(redis_server, tmp_path, monkeypatch):
    from hllm.features import retire as retiring
    from hllm.registry.promote import promote

    settings = settings_for(tmp_path, online="redis", online_url=redis_server.place)
    for number in range(1, 5):
        export = write_export(tmp_path / "root" / "embed-hllm-3" / f"key{number}", seed=10 * number)
        version = str(register(settings, export))
        publish(settings, version)
        verify(settings, version)
        promote(settings, version, by="a test")
    with monkeypatch.context() as patch:
        patch.setattr(retiring, "_remove_redis_rows", _die)
        with pytest.raises(RuntimeError):
            retire(settings)
    assert tags_of(settings, 1)["publication"] == "retired"
    with (
        publisher(settings, 1),
        pytest.raises(InfraError, match="another publisher is at work"),
    ):
        retire(settings)
    assert retire(settings) == [1]
    assert retire(settings) == []
    assert connect(settings).dbsize() == 100


def _die(*_) -> str:
    raise RuntimeError("killed")
