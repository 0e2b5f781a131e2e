"""Whatever a hand or a lost write has done to tags and aliases: commands end with a sentence, never with a
bug, and `hllm rollback --to N` brings a sound version back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hllm.features.retire import to_retire
from hllm.foreign_errors import as_ours
from hllm.plan import _release_states
from hllm.registry import versions
from hllm.registry.announce import announcement
from hllm.registry.outputs import output_of
from hllm.registry.promote import promote, reject, rollback
from hllm.settings import Mlflow, Run, Settings
from hllm.work import mlflow as server
from tests.registry.test_promote import serving, stand

ODD = ("", "-1", "1.0", "²", "9" * 5000, "99", "[]", "\x1b[31m1")
"""What may stand where the number of a version is expected."""
CHANGES = (
    *("{", "null", "7", "[1, 2]", "[" * 5000, '{"action": "promoted", "to": Infinity}'),
    *(
        json.dumps({"action": action, "to": to, "from": 1})
        for action, to in (
            *(("promoted", to) for to in (99, -1, "2", 1.0, 10**40, True, [2])),
            *(("rolled back", to) for to in (99, 1.5, None)),
            ("odd", 1),
            (["promoted"], 1),
        )
    ),
)
TAGS = ("gate", "publication", "pipeline", "export", "decision", "decided_at", "decided_by", "gate_reasons")
TAGS += ("feast.feature_service", "rolled_back_by")


def damages() -> Iterator[tuple[str, Callable[[Settings], None]]]:
    """Name, and what it does; version 1 is never touched."""
    for odd in ODD:
        yield f"serving {odd[:9]!r}", _model_tag("hllm.serving_version", odd)
        yield f"replaced {odd[:9]!r}", _tag(2, "replaced", odd)
    for change in CHANGES:
        yield f"change {change[:60]}", _model_tag("hllm.last_change", change)
    for name in TAGS:
        for number, text in ((2, None), (3, None), (2, "odd\x1b]0;x\x07")):
            yield f"{name} of {number} {text!r}", _tag(number, name, text)
    yield "no last change", _model_tag("hllm.last_change", None)
    yield "nothing serves", _model_tag("hllm.serving_version", None)
    yield "alias gone", lambda settings: versions.remove_alias(settings, "champion")
    yield "alias by hand", lambda settings: versions.set_alias(settings, "champion", 3)
    yield "champion deleted", lambda settings: _delete(settings, 2)
    yield "candidate deleted", lambda settings: _delete(settings, 3)
    yield "both deleted", lambda settings: (_delete(settings, 2), _delete(settings, 3))[0]


def _model_tag(name: str, value: str | None) -> Callable[[Settings], None]:
    def damage(settings: Settings) -> None:
        client, model = server.client(settings), settings.mlflow.model_name
        if value is None:
            client.delete_registered_model_tag(model, name)
        else:
            client.set_registered_model_tag(model, name, value)

    return damage


def _tag(number: int, name: str, value: str | None) -> Callable[[Settings], None]:
    def damage(settings: Settings) -> None:
        client, model = server.client(settings), settings.mlflow.model_name
        if value is None:
            client.delete_model_version_tag(model, str(number), name)
        else:
            client.set_model_version_tag(model, str(number), name, value)

    return damage


def _delete(settings: Settings, number: int) -> None:
    server.client(settings).delete_model_version(settings.mlflow.model_name, str(number))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """The database of three versions: 1 was replaced by 2, which serves, and 3 is a candidate."""
    database = tmp_path_factory.mktemp("damage") / "mlflow.db"
    shutil.copy(migrated, database)
    settings = of(database)
    for _ in range(3):
        stand(settings)
    promote(settings, "1", by="ada")
    promote(settings, "2", by="ada")
    return database


def of(database: Path) -> Settings:
    return Settings(
        run=Run(name="shop", root=str(database.parent / "runs"), threads=1),
        mlflow=Mlflow(
            tracking_uri=f"sqlite:///{database}",
            artifact_root=str(database.parent / "art"),
            keep_system_metrics=False,
        ),
    )


TABLE = dict(damages())


@pytest.mark.parametrize("name", TABLE)
def test_commands_end_with_a_sentence_and_a_version_that_is_named_comes_back(
    sound: Path, tmp_path: Path, name: str
) -> None:
    settings = of(tmp_path / "mlflow.db")
    shutil.copy(sound, tmp_path / "mlflow.db")
    TABLE[name](settings)
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "again.db")
    for act in (
        lambda: versions.serving_version(settings),
        lambda: to_retire(settings),
        lambda: announcement(settings, 2),
        lambda: _release_states(settings, "pipeline2"),
        lambda: output_of(settings, versions.registered_version(settings, "3"), "prepare"),
        lambda: rollback(settings, by="bob"),
        lambda: promote(settings, "3", by="ada"),
        lambda: reject(settings, "3", by="ada"),
    ):
        _ends_well(act)
    again = of(tmp_path / "again.db")
    rollback(again, "1", by="bob")
    assert serving(again) == 1


def _ends_well(act: Callable[[], object]) -> None:
    """With a result or a sentence and an exit code that a scheduler acts on."""
    try:
        act()
    except Exception as error:
        ours = as_ours(error)
        if ours is None:
            raise
        assert ours.exit_code in (64, 65, 66, 75)
