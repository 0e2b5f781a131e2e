"""What is watched: every kind of trouble has its alert, and the alert says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hllm.errors import ConfigError, GateError
from hllm.features import watch as watching
from hllm.features.monitors import begun_refreshes, folder_of
from hllm.features.watch import watch
from hllm.registry.versions import set_tags
from hllm.work import objects
from hllm.work.artifacts import Manifest, Store
from tests.features.refreshing import catalogue, go_on, register, serve

TODAY = 1_600_000_000 + 3_600 * 200


@pytest.fixture
def served(trained, tiny_source, tmp_path):
    """Two versions of one model, the second serving, with today's data read."""
    from hllm.features.publish import publish
    from hllm.features.verify import verify
    from hllm.registry.promote import promote

    settings = serve(trained, tmp_path)
    register(settings, trained)
    publish(settings, "2")
    verify(settings, "2")
    promote(settings, "2", by="a test")
    return go_on(settings, tmp_path / "today", tiny_source.events, **catalogue(tiny_source))


def test_a_sound_version_has_no_alert_and_a_page(served, capsys):
    looks = {look.name: look for look in watch(served)}
    assert not [look.says for look in looks.values() if look.alert]
    assert looks["user_coverage"].value == looks["item_coverage"].value == 1
    assert (
        looks["null_rate"].value == looks["online_offline_mismatch"].value == looks["unfinished"].value == 0
    )
    assert looks["norm_drift"].value < 1e-5
    assert looks["cosine_to_previous"].value == pytest.approx(1)  # the same model, published twice
    assert looks["agreement_with_previous"].value == pytest.approx(1)
    assert 0 <= looks["users_age_hours"].value < 1
    assert "version 2 is fresh, complete and sound" in capsys.readouterr().out

    families = {
        family.name: family
        for family in text_string_to_metric_families((folder_of(served) / "metrics.prom").read_text())
    }
    assert families["hllm_watch_user_coverage"].samples[0].labels == {"model": "hllm", "version": "2"}
    alerts = families["hllm_watch_alert"].samples
    assert {sample.labels["look"] for sample in alerts} == {
        name for name, look in looks.items() if look.limit
    }
    assert all(sample.value == 0 for sample in alerts)
    page = (folder_of(served) / "index.html").read_text()
    assert "Fresh, complete and sound." in page
    assert all(look.title in page for look in looks.values())
    assert "http" not in page  # nothing to load
    watch(served)
    history = (folder_of(served) / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in history] == [2, 2]


def test_every_trouble_has_its_alert(served, tiny_source, tmp_path, monkeypatch):
    columns = catalogue(tiny_source)
    for number in range(20):
        for name, value in (("item_id", f"new {number}"), ("title", "New"), ("genre", None)):
            columns[name].append(value)
    new_users = [(f"new {number}", "item20", TODAY + number) for number in range(20)]
    later = go_on(served, tmp_path / "later", [*tiny_source.events, *new_users], **columns)
    with sqlite3.connect(served.feast.online_url) as online:
        users = "DELETE FROM \"hllm_hllm_user_v2\" WHERE feature_name = 'user_vector' AND rowid % 2"
        assert online.execute(users).rowcount
        assert online.execute(
            'UPDATE "hllm_hllm_item_v2" SET value = (SELECT value FROM "hllm_hllm_item_v2" '
            "WHERE feature_name = 'item_vector' LIMIT 1) WHERE feature_name = 'item_vector'"
        ).rowcount
    begun = folder_of(later).parent / "refresh" / "v2-users-0001" / "plan.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    yesterday = time.time() - 86_400
    os.utime(begun, (yesterday, yesterday))
    monkeypatch.setattr(watching, "datetime", _late(timedelta(days=3)))
    with pytest.raises(GateError) as raised:
        watch(later)
    says = str(raised.value)
    for name, remedy in {
        "users_age_hours": "does the DAG hllm_users run",
        "items_age_hours": "does the DAG hllm_items run",
        "user_coverage": "run `hllm refresh users`",
        "item_coverage": "run `hllm refresh items`",
        "null_rate": "hllm verify --version 2",
        "online_offline_mismatch": "hllm rollback",
        "agreement_with_previous": "look at both reports",
        "unfinished": "run again what stopped (v2-users-0001)",
    }.items():
        assert name in raised.value.first_line
        assert remedy in says
    assert raised.value.exit_code == 66
    page = (folder_of(later) / "index.html").read_text()
    assert "What to do" in page
    assert 'look="null_rate"} 1' in (folder_of(later) / "metrics.prom").read_text()


def test_nothing_serves_and_no_data_yet(served, tmp_path):
    unknown = served.model_copy(update={"mlflow": served.mlflow.model_copy(update={"model_name": "unknown"})})
    with pytest.raises(ConfigError, match="no version serves"):
        watch(unknown)
    unread = served.model_copy(update={"run": served.run.model_copy(update={"name": "another"})})
    with pytest.raises(GateError, match="data_missing"):
        watch(unread)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _scribble(path: Path) -> None:
    path.write_bytes(b"\xff\x00 no such file \n{" * 40)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN = [
    *(("feast/offline/**/*.parquet", damage, "soundness_unknown") for damage in (_cut, Path.unlink)),
    *(("feast/registry.db", damage, "freshness_unknown") for damage in (_cut, Path.unlink, _folder)),
    *(("feast/online.db", damage, "soundness_unknown") for damage in (_scribble, Path.unlink)),
    *(("root/embed-hllm-3/*/manifest.json", damage, "soundness_unknown") for damage in (_cut, Path.unlink)),
    *(("root/validate/*/manifest.json", damage, "coverage_unknown") for damage in (_scribble, _folder)),
    *(("root/watch/*", damage, "") for damage in (_cut, _scribble)),
    *((f"root/watch/{name}", _folder, "page_unwritten") for name in ("history.jsonl", "index.html")),
]
"""What is broken, how, and the alert that says so; none where the watch writes its own files anew."""


def test_whatever_is_broken_the_rest_is_looked_at(served, tmp_path, capsys):
    watch(served)
    whole = tmp_path / "whole"
    paths = [Path(served.feast.registry).parent, Path(served.run.root)]
    for path in paths:
        shutil.copytree(path, whole / path.name)  # also what was a link to the session's own outputs
    for pattern, damage, alert in BROKEN:
        for path in paths:
            shutil.rmtree(path)
            shutil.copytree(whole / path.name, path)
        found = [path for path in paths[0].parent.glob(pattern) if path.exists()]
        assert found, pattern
        for path in found:
            damage(path)
        capsys.readouterr()
        with pytest.raises(GateError, match=alert) if alert else contextlib.nullcontext():
            watch(served)
        assert capsys.readouterr().out.count("watch: ") >= 5, (pattern, damage)


def test_a_source_that_moved_on_and_a_quiet_catalogue_are_no_trouble(served, tmp_path, monkeypatch, capsys):
    from hllm.features.refresh import refresh

    for _ in range(2):
        refresh(served, "items")
    assert "reused, items of version 2" in capsys.readouterr().out
    log = Path(served.data.interactions)
    log.write_text(log.read_text() + "u3,item20,1700000000\n")  # not read yet
    days_later = datetime.now(UTC) + timedelta(days=3)
    set_tags(served, 2, {"items_unchanged_at": days_later.isoformat()})
    monkeypatch.setattr(watching, "datetime", _late(timedelta(days=3)))
    limits = served.watch.model_copy(update={"max_user_hours": 100.0})
    looks = {look.name: look for look in watch(served.model_copy(update={"watch": limits}))}
    assert looks["items_age_hours"].value < 1
    assert looks["users_age_hours"].value > 71
    assert looks["user_coverage"].value == 1


def _late(by: timedelta) -> type[datetime]:
    class Late(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + by

    return Late


def test_a_pod_finds_what_is_in_s3(served, s3, tmp_path, monkeypatch):
    """Another machine's look and its unfinished refresh; of finished ones no vector is fetched."""
    from hllm.features.refresh import refresh
    from hllm.registry.versions import registered_version, set_tags

    bucket = s3.bucket("watched")
    there = served.model_copy(update={"run": served.run.model_copy(update={"root": f"{bucket}/runs"})})
    outputs = Store(there.run.root)
    for step in ("publish", "validate", "embed-hllm-3"):
        for folder in (Path(served.run.root) / step).iterdir():
            if folder.is_dir():
                shutil.copytree(folder, outputs.local / step / folder.name)
                manifest = Manifest.read(folder)
                (outputs.local / step / folder.name / "manifest.json").unlink()
                outputs.finish(manifest)
    export = f"{there.run.root}/{'/'.join(registered_version(served, '2').output(served))}"
    set_tags(served, 2, {"export": export})
    refresh(there, "users")
    objects.write_object(f"{bucket}/runs/refresh/v2-items-0001/plan.json", b"{}")
    watch(there)
    monkeypatch.setenv("HOME", str(tmp_path / "another machine"))
    looks = {look.name: look for look in watch(there)}
    assert looks["users_age_hours"].value < 1
    assert [name for name, _ in begun_refreshes(Store(there.run.root))] == ["v2-items-0001"]
    assert len((folder_of(there) / "history.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "another machine").rglob("refresh/*/manifest.json"))
