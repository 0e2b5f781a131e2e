"""The registry file: whole at any moment, never taken for an empty one, and made again from records."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hllm.errors import InfraError
from hllm.features.export import USER
from hllm.features.offline import count_offline
from hllm.features.publish import publish, publish_again
from hllm.features.store import open_store
from hllm.features.verify import verify
from hllm.registry.promote import promote
from hllm.registry.versions import serving_version
from hllm.settings import Settings
from tests.features.world import online, register, settings_for, write_export


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """One version that is published, verified and serves."""
    folder = tmp_path_factory.mktemp("registry")
    settings = settings_for(folder)
    register(settings, write_export(folder / "root" / "embed-hllm-3" / "key"))
    publish(settings, "1")
    verify(settings, "1")
    promote(settings, "1", by="a test")
    return settings


def rows(settings: Settings) -> object:
    return online(settings, 1, [("u50", "i30"), ("u7", "0042")])


def test_a_write_that_is_cut_off_leaves_the_registry_that_was(
    serving: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = Path(serving.feast.registry), open_store(serving)
    before, names = path.read_bytes(), {path.name for path in path.parent.iterdir()}

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        store.apply(store.list_entities())
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert {path.name for path in path.parent.iterdir()} == names


@pytest.mark.parametrize("content", [b"", b"\x00", b"half of a registry", None])
def test_a_registry_that_is_gone_or_damaged_is_an_error_and_published_again(
    serving: Settings, content: bytes | None
) -> None:
    path, before, moments = Path(serving.feast.registry), rows(serving), _moments(serving)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for command in (lambda: open_store(serving), lambda: verify(serving, "1")):
        with pytest.raises(InfraError, match=r"registry is (gone|empty or damaged)(.|\n)*publish --again vN"):
            command()
    assert content is None or path.read_bytes() == content  # nothing was made of it meanwhile
    publish_again(serving, "1")
    assert rows(serving) == before
    assert _moments(serving) == moments
    assert serving_version(serving).version == 1  # type: ignore[union-attr]
    verify(serving, "1")


def test_lost_rows_and_files_are_written_again(serving: Settings) -> None:
    before, moments = rows(serving), _moments(serving)
    Path(serving.feast.online_url).unlink()
    for file in Path(serving.feast.offline_path).iterdir():
        file.unlink()
    publish_again(serving, "1")
    assert rows(serving) == before
    assert count_offline(serving, USER, 1, open_store_moment(serving)) == 60
    assert _moments(serving) == moments


def open_store_moment(settings: Settings):  # type: ignore[no-untyped-def]
    from datetime import datetime

    return datetime.fromisoformat(_moments(settings)[1])


def _moments(settings: Settings) -> tuple[str, str]:
    tags = open_store(settings).get_feature_service("hllm_v1").tags
    return tags["started_at"], tags["available_at"]
