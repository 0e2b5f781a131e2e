from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from hllm.errors import ConfigError, GateError
from hllm.registry import versions
from hllm.registry.promote import promote, reject, rollback
from hllm.settings import Settings
from hllm.work import mlflow as server

SERVICE = "feast.feature_service"


def stand(settings: Settings, gate: str = "passed", publication: str = "verified") -> int:
    """A registered version as `register`, `publish` and `verify` leave it."""
    client, model = server.client(settings), settings.mlflow.model_name
    if not versions.all_versions(settings):
        client.create_registered_model(model)
    number = len(versions.all_versions(settings)) + 1
    tags = {
        "gate": gate,
        "gate_reasons": "NDCG@10 0.0100 does not exceed 1 x most-popular's 0.0200",
        "publication": publication,
        "pipeline": f"pipeline{number}",
        "export": f"{settings.run.root}/embed-hllm-3/key{number}",
    }
    if publication == "verified":
        tags[SERVICE] = f"hllm_v{number}"
    client.create_model_version(model, f"/models/{number}", tags=tags)
    if gate == "passed":
        versions.set_alias(settings, "candidate", number)
    return number


def serving(settings: Settings) -> int | None:
    info = versions.serving_version(settings)
    return info.version if info else None


def test_promotion_moves_the_alias_and_records_who_when_and_why(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stand(settings)
    promote(settings, "1", by="ada", note="better on cold items", at="2026-03-01T12:00:00+01:00")
    info = versions.champion(settings)
    assert info is not None
    assert info.aliases == ("champion",)  # a champion is no candidate any more
    assert info.tags["decision"] == "approved"
    assert info.tags["decided_by"] == "ada"
    assert info.tags["decided_at"] == "2026-03-01T12:00:00+01:00"
    assert info.tags["decision_note"] == "better on cold items"
    assert versions.model_tags(settings)["hllm.serving_version"] == "1"
    said = capsys.readouterr().out
    assert "champion of hllm moved to version 1 (service hllm_v1), decided by ada" in said


def test_promoting_twice_changes_nothing(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    stand(settings)
    first = promote(settings, "1", by="ada")
    capsys.readouterr()
    assert promote(settings, "1", by="eve").tags == first.tags
    assert "is the champion already; nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize("publication", ["absent", "publishing", "published"])
def test_a_version_that_is_not_verified_cannot_be_promoted(settings: Settings, publication: str) -> None:
    stand(settings, publication=publication)
    with pytest.raises(GateError, match="not fully published") as error:
        promote(settings, "1", by="ada")
    assert "hllm verify --version 1" in str(error.value)
    assert versions.champion(settings) is None
    assert "decided_by" not in versions.registered_version(settings, "1").tags


def test_a_version_that_failed_the_gate_cannot_be_promoted(settings: Settings) -> None:
    stand(settings, gate="failed")
    with pytest.raises(GateError, match=r"most-popular's 0\.0200"):
        promote(settings, "1", by="ada")
    assert versions.champion(settings) is None


def test_a_time_that_is_none_is_refused(settings: Settings) -> None:
    stand(settings)
    with pytest.raises(ConfigError, match="--at yesterday: is not an ISO 8601 time"):
        promote(settings, "1", at="yesterday")


def test_rollback_walks_back_version_by_version(settings: Settings) -> None:
    for number in (1, 2, 3):
        stand(settings)
        promote(settings, str(number), by="ada")
    left = rollback(settings, by="bob", note="clicks fell")
    assert left.version == serving(settings) == 2
    third = versions.registered_version(settings, "3")
    assert third.tags["decision"] == "rolled back"
    assert (third.tags["rolled_back_by"], third.tags["rolled_back_note"]) == ("bob", "clicks fell")
    assert third.tags["decided_by"] == "ada"  # who once approved stays on record
    change = json.loads(versions.model_tags(settings)["hllm.last_change"])
    assert (change["action"], change["from"], change["to"], change["by"]) == ("rolled back", 3, 2, "bob")
    rollback(settings, by="bob")  # asked again after a lost answer: not back twice
    assert serving(settings) == 2
    rollback(settings, "1", by="bob")
    assert serving(settings) == 1
    promote(settings, "3", by="ada")
    again = versions.registered_version(settings, "3")
    assert again.tags["decision"] == "approved"
    assert "rolled_back_by" not in again.tags


KILLED = """
import os, sys
from hllm.registry import promote, versions
from hllm.settings import Settings
move = versions.set_alias
def die(*args):
    if sys.argv[2] == "after":
        move(*args)
    os.kill(os.getpid(), 9)
versions.set_alias = die
promote.promote(Settings.model_validate_json(sys.argv[1]), "3", by="ada", note="better")
"""


def promote_and_kill(settings: Settings, when: str) -> None:
    """Versions 1 and 2 have served; a process ends by SIGKILL before or after it moves `champion` to 3."""
    for number in (1, 2):
        stand(settings)
        promote(settings, str(number), by="ada")
    stand(settings)
    argv = [sys.executable, "-c", KILLED, settings.model_dump_json(), when]
    assert subprocess.run(argv, timeout=120, check=False).returncode == -9


def test_rollback_after_a_promotion_killed_before_the_alias_moved_keeps_the_champion(
    settings: Settings,
) -> None:
    promote_and_kill(settings, "before")
    assert serving(settings) == 2
    assert rollback(settings, by="bob", note="it died").version == serving(settings) == 2
    third = versions.registered_version(settings, "3")
    assert (third.tags["decision"], third.tags["rolled_back_by"]) == ("rolled back", "bob")
    change = json.loads(versions.model_tags(settings)["hllm.last_change"])
    assert (change["action"], change["from"], change["to"]) == ("rolled back", 3, 2)
    assert rollback(settings, "1", by="bob").version == 1  # and from here on as ever


def test_a_promotion_killed_after_the_alias_moved_is_finished_by_the_same_command(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    promote_and_kill(settings, "after")
    assert serving(settings) == 3
    capsys.readouterr()
    promote(settings, "3", by="ada")
    assert "champion of hllm moved from version 2 to version 3" in capsys.readouterr().out
    assert versions.model_tags(settings)["hllm.serving_version"] == "3"
    client = server.client(settings)
    (experiment,) = client.search_experiments(filter_string="name = 'shop'")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parent = next(run for run in runs if run.data.tags.get("hllm.pipeline") == "pipeline3")
    of_third = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.info.status for run in of_third] == ["KILLED", "FINISHED"]
    assert parent.info.status == "FINISHED"
    assert rollback(settings, by="bob").version == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moved", [False, True])
def test_an_unfinished_change_is_settled_by_rollback(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    real = versions.set_alias

    def die(*args: Any) -> None:
        if moved:
            real(*args)
        raise Killed

    for number in (1, 2, 3):
        stand(settings)
        if number < 3:
            promote(settings, str(number), by="ada")
    monkeypatch.setattr(versions, "set_alias", die)
    with pytest.raises(Killed):
        promote(settings, "3", by="ada")
    monkeypatch.setattr(versions, "set_alias", real)
    assert rollback(settings, by="bob").version == serving(settings) == 2
    monkeypatch.setattr(versions, "set_alias", die)
    with pytest.raises(Killed):
        rollback(settings, "1", by="bob")
    monkeypatch.setattr(versions, "set_alias", real)
    assert rollback(settings, by="bob").version == serving(settings) == 1  # finishes what was begun
    assert versions.model_tags(settings)["hllm.serving_version"] == "1"


def test_rollback_to_a_version_that_is_not_published_is_refused(settings: Settings) -> None:
    stand(settings, publication="absent")
    stand(settings)
    promote(settings, "2", by="ada")
    with pytest.raises(GateError, match="not fully published"):
        rollback(settings, "1", by="bob")
    assert serving(settings) == 2


def test_an_alias_moved_by_hand_to_an_unpublished_version_does_not_reach_readers(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stand(settings)
    promote(settings, "1", by="ada")
    stand(settings, publication="absent")
    versions.set_alias(settings, "champion", 2)
    capsys.readouterr()
    assert serving(settings) == 1
    said = capsys.readouterr().err
    assert "names version 2, which is not published (absent)" in said
    assert "Version 1, promoted last, goes on serving" in said
    rollback(settings, by="bob")  # undoes the move by hand
    assert versions.champion(settings) == versions.registered_version(settings, "1")


def test_an_alias_removed_by_hand_does_not_stop_readers(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stand(settings)
    promote(settings, "1", by="ada")
    versions.remove_alias(settings, "champion")
    assert serving(settings) == 1
    assert "the alias champion is gone" in capsys.readouterr().err


def test_an_alias_moved_by_hand_to_a_published_version_counts(settings: Settings) -> None:
    stand(settings)
    stand(settings)
    promote(settings, "2", by="ada")
    versions.set_alias(settings, "champion", 1)
    assert serving(settings) == 1


def test_nothing_serves_before_the_first_promotion(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving(settings) is None
    assert capsys.readouterr().err == ""
    stand(settings, publication="published")
    versions.set_alias(settings, "champion", 1)
    assert serving(settings) is None
    assert "nothing serves" in capsys.readouterr().err


def test_the_feature_service_is_named_on_verified_versions_only(settings: Settings) -> None:
    stand(settings, publication="published")
    with pytest.raises(ConfigError, match="only on a verified version"):
        versions.set_tags(settings, 1, {SERVICE: "hllm_v1"})
    versions.set_tags(settings, 1, {SERVICE: "hllm_v1", "publication": "verified"})
    assert versions.registered_version(settings, "1").tags[SERVICE] == "hllm_v1"
    versions.set_tags(settings, 1, {"publication": "publishing"})
    assert SERVICE not in versions.registered_version(settings, "1").tags
    with pytest.raises(ConfigError, match="publication is one of"):
        versions.set_tags(settings, 1, {"publication": "done"})


def test_a_rejection_keeps_its_reason_and_the_version_is_no_candidate(settings: Settings) -> None:
    stand(settings)
    moment = datetime(2026, 3, 1, tzinfo=UTC).isoformat()
    info = reject(settings, "1", by="ada", note="worse on new users", at=moment)
    assert info.aliases == ()
    assert info.tags["decision"] == "rejected"
    assert (info.tags["decided_by"], info.tags["decided_at"]) == ("ada", moment)
    assert info.tags["decision_note"] == "worse on new users"


def test_a_rejected_version_needs_a_new_approval_and_its_rejection_stays_on_record(
    settings: Settings,
) -> None:
    stand(settings)
    reject(settings, "1", by="ada", note="worse on new users", at="2026-03-01T12:00:00+00:00")
    for refused in (
        lambda: promote(settings, "1", by="bob"),
        lambda: promote(settings, "1", by="bob", at="2026-03-01T11:00:00+00:00"),  # an earlier approval
        lambda: rollback(settings, "1", by="bob"),
    ):
        with pytest.raises(
            GateError, match=r"was rejected by ada at 2026-03-01T12.*worse on new users"
        ) as error:
            refused()
        assert "hllm promote --version 1 --by WHO --at WHEN" in str(error.value)
    assert versions.champion(settings) is None
    assert versions.registered_version(settings, "1").tags["decided_by"] == "ada"

    info = promote(settings, "1", by="bob", note="the new users were bots", at="2026-03-02T09:00:00+00:00")
    assert (info.tags["decision"], info.tags["decided_by"]) == ("approved", "bob")
    assert (info.tags["rejected_by"], info.tags["rejected_note"]) == ("ada", "worse on new users")
    assert info.tags["rejected_at"] == "2026-03-01T12:00:00+00:00"
    assert serving(settings) == 1


def test_the_champion_cannot_be_rejected(settings: Settings) -> None:
    stand(settings)
    promote(settings, "1", by="ada")
    with pytest.raises(GateError, match="champion"):
        reject(settings, "1", by="bob")


@pytest.mark.parametrize("name", ["2", "candidate", "champion"])
def test_an_unknown_version_is_answered_with_the_known_ones(settings: Settings, name: str) -> None:
    stand(settings, gate="failed", publication="absent")
    with pytest.raises(ConfigError, match=f"no .* {name}") as error:
        versions.registered_version(settings, name)
    assert "Versions: 1." in str(error.value)


def test_versions_are_found_by_number_alias_and_pipeline(settings: Settings) -> None:
    stand(settings)
    stand(settings)
    assert versions.registered_version(settings, "1").version == 1
    found = versions.registered_version(settings, "candidate")
    assert (found.version, found.output(settings)) == (2, ("embed-hllm-3", "key2"))
    by_pipeline = versions.version_of_pipeline(settings, "pipeline1")
    assert by_pipeline is not None
    assert by_pipeline.version == 1
    assert versions.version_of_pipeline(settings, "unknown") is None
