"""Which version serves: `promote` moves the alias `champion` forward, `rollback` back; both leave a trail.

Order matters: everything is checked first; then the registered model's tag `hllm.last_change` says what is
about to happen, the version's record is written, and the alias moves; `hllm.serving_version` follows last. A
process killed before the alias moved leaves the earlier champion serving; the same command finishes the work,
and `rollback` takes back a promotion that was not finished.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from hllm.errors import ConfigError, GateError
from hllm.registry import versions
from hllm.registry.versions import CANDIDATE, CHAMPION, SERVICE_TAG, SERVING_TAG, VersionInfo
from hllm.settings import Settings
from hllm.work import tracking
from hllm.work.artifacts import user_name
from hllm.work.termination import say

REPLACED_TAG = "replaced"
CHANGE_TAG = "hllm.last_change"
EARLIEST, SKEW = datetime(2020, 1, 1, tzinfo=UTC), timedelta(hours=1)
"""When a decision can have been made: not before there was anything to decide, nor later than clocks
differ."""
_DECIDED = ("decided_by", "decided_at", "decision_note")
_REJECTED = ("rejected_by", "rejected_at", "rejected_note")
_ROLLED_BACK = ("rolled_back_by", "rolled_back_at", "rolled_back_note")


def promote(
    settings: Settings, version: str | None = None, *, by: str = "", note: str = "", at: str = ""
) -> VersionInfo:
    """Move `champion` to a version that passed the gate and whose published vectors were verified.

    A version that was rejected needs an approval with a time, `at`, later than the rejection; who rejected it
    then stays on record in `rejected_by`, `rejected_at` and `rejected_note`.

    Raises:
        GateError: the gate failed, the version was rejected, or it is not fully published.
        ConfigError: there is no such version, or `at` is not a time.
    """
    chosen = versions.registered_version(settings, version)
    audit = _audit("approved", by, note, at)
    if chosen.tags.get("gate") != "passed":
        raise GateError(
            f"did not pass the gate: {chosen.tags.get('gate_reasons', 'no verdict')}",
            where=_name(chosen),
            remedy="Its description in MLflow has the numbers; the thresholds are the settings gate.*.",
        )
    _refuse_rejected(chosen, at and audit["decided_at"])
    _refuse_unpublished(chosen)
    last, named = versions.last_promoted(settings), versions.champion(settings)
    if _serves(chosen, last):
        _drop_candidate(settings, chosen)
        say(f"promote: {_name(chosen)} is the champion already; nothing changed")
        return versions.registered_version(settings, str(chosen.version))
    before = next((info for info in (last, named) if info and info.version != chosen.version), None)
    if before:
        audit[REPLACED_TAG] = str(before.version)
    kept = {}
    if chosen.tags.get("decision") == "rejected":
        kept = dict(zip(_REJECTED, (chosen.tags.get(name, "") for name in _DECIDED), strict=True))
    with tracking.version_run(settings, chosen, "promote", audit):
        _announce(settings, chosen, before, "promoted", audit)
        versions.set_tags(settings, chosen.version, kept | dict.fromkeys(_ROLLED_BACK) | audit)
        versions.set_alias(settings, CHAMPION, chosen.version)
    _settle(settings, chosen, before, "promoted", audit)
    _drop_candidate(settings, chosen)
    return versions.registered_version(settings, str(chosen.version))


def reject(
    settings: Settings, version: str | None = None, *, by: str = "", note: str = "", at: str = ""
) -> VersionInfo:
    """Record that a person decided against a version: it keeps the note and is no candidate any more.

    Raises:
        GateError: the version serves; `hllm rollback` is the way to take it back.
    """
    chosen = versions.registered_version(settings, version)
    if CHAMPION in chosen.aliases:
        raise GateError(
            "is the champion and cannot be rejected", where=_name(chosen), remedy="Run `hllm rollback`."
        )
    audit = _audit("rejected", by, note, at)
    if chosen.tags.get("decision") == "rejected":
        say(f"reject: {_name(chosen)} was rejected already; nothing changed")
    else:
        versions.set_tags(settings, chosen.version, audit)
        say(f"rejected: {_name(chosen)}, decided by {audit['decided_by']} at {audit['decided_at']}: {note}")
    _drop_candidate(settings, chosen)
    return versions.registered_version(settings, str(chosen.version))


def rollback(settings: Settings, to: str | None = None, *, by: str = "", note: str = "") -> VersionInfo:
    """Move `champion` back: to the version it replaced, or to any version that is still fully published.

    Raises:
        ConfigError: there is nothing to go back to.
        GateError: the vectors of that version are not published (any more), or it was rejected.
    """
    last, named = versions.last_promoted(settings), versions.champion(settings)
    begun = _unfinished_change(settings, last)
    if to is None:
        done = _last_change(settings)
        settled = begun is None and named is not None and last is not None and last.version == named.version
        if settled and last and (done.get("action"), done.get("to")) == ("rolled back", last.version):
            # Perhaps asked again after an answer that was lost: it must not go back twice.
            say(
                f"rollback: {_name(last)} serves since the rollback from version {done.get('from')} at "
                f"{done.get('at')}; nothing changed. To go back further, name a version: --to N"
            )
            return last
        target = _earlier(settings, named, last, begun)
    else:
        target = versions.registered_version(settings, to)
    _refuse_rejected(target)
    _refuse_unpublished(target)
    if _serves(target, last) and begun is None:
        say(f"rollback: {_name(target)} is the champion already; nothing changed")
        return target
    promoted = _begun_version(settings, begun) if begun and begun["action"] == "promoted" else None
    left = next((info for info in (promoted, named, last) if info and info.version != target.version), None)
    audit = _audit("rolled back", by, note, "")
    _announce(settings, target, left, "rolled back", audit)
    if left:
        trail = dict(zip(_ROLLED_BACK, (audit["decided_by"], audit["decided_at"], note), strict=True))
        versions.set_tags(settings, left.version, {**trail, "decision": "rolled back"})
    versions.set_alias(settings, CHAMPION, target.version)
    _settle(settings, target, left, "rolled back", audit)
    return versions.registered_version(settings, str(target.version))


def _announce(
    settings: Settings, to: VersionInfo, left: VersionInfo | None, action: str, audit: dict[str, str]
) -> None:
    """What is about to happen, before anything of it does."""
    change = {"action": action, "from": left.version if left else None, "to": to.version}
    change |= {"by": audit["decided_by"], "at": audit["decided_at"], "note": audit["decision_note"]}
    versions.set_model_tags(settings, {CHANGE_TAG: json.dumps(change)})


def _settle(
    settings: Settings, to: VersionInfo, left: VersionInfo | None, action: str, audit: dict[str, str]
) -> None:
    """The alias has moved: the change is done."""
    versions.set_model_tags(settings, {SERVING_TAG: str(to.version)})
    came_from = f"from version {left.version} " if left else ""
    say(
        f"{action}: champion of {to.model} moved {came_from}to version {to.version} "
        f"(service {to.tags[SERVICE_TAG]}), decided by {audit['decided_by']} at {audit['decided_at']}"
        + (f": {audit['decision_note']}" if audit["decision_note"] else "")
    )


def _serves(info: VersionInfo, last: VersionInfo | None) -> bool:
    return CHAMPION in info.aliases and last is not None and last.version == info.version


def _unfinished_change(settings: Settings, last: VersionInfo | None) -> dict[str, Any] | None:
    """The change that had been announced, but not settled, when its process ended; none to a version that
    somebody deleted since."""
    change = _last_change(settings)
    if not change or (last is not None and last.version == change["to"]):
        return None
    return change if _begun_version(settings, change) else None


def _last_change(settings: Settings) -> dict[str, Any]:
    """The change of the champion that was announced last; nothing, where somebody edited its tag."""
    try:
        change = dict(json.loads(versions.model_tags(settings).get(CHANGE_TAG) or "{}"))
        if change.get("action") in ("promoted", "rolled back") and type(change.get("to")) is int:
            return change
    except (ValueError, TypeError, RecursionError):
        pass
    return {}


def _begun_version(settings: Settings, change: dict[str, Any]) -> VersionInfo | None:
    return versions.version_named(settings, str(change["to"]))


def _earlier(
    settings: Settings, named: VersionInfo | None, last: VersionInfo | None, begun: dict[str, Any] | None
) -> VersionInfo:
    """The default of a rollback: finish one that was begun, undo a promotion that was not finished or a move
    made by hand, or else the version that the champion replaced."""
    if begun and begun["action"] == "rolled back" and (asked := _begun_version(settings, begun)):
        return asked
    if last and (begun or named is None or named.version != last.version):
        return last
    replaced = versions.version_named(settings, named.tags.get(REPLACED_TAG, "")) if named else None
    if replaced is None:
        known = ", ".join(str(info.version) for info in versions.all_versions(settings) if info.verified)
        remedy = (
            f"Published versions: {known}; choose one with --to." if known else "No version is published yet."
        )
        raise ConfigError(
            "there is no earlier champion to go back to", where=settings.mlflow.model_name, remedy=remedy
        )
    return replaced


def _refuse_rejected(chosen: VersionInfo, approved_at: str = "") -> None:
    """Only an approval that is known to be later than the rejection counts."""
    by, at, note = (chosen.tags.get(name, "") for name in _DECIDED)
    if chosen.tags.get("decision") != "rejected":
        return
    if approved_at and _later(approved_at, at):
        return
    raise GateError(
        f"was rejected by {by} at {at}{f': {note}' if note else ''}",
        where=_name(chosen),
        remedy="It needs a new approval: trigger the DAG hllm_release with this version, or say who approved "
        f"it after that, and when: `hllm promote --version {chosen.version} --by WHO --at WHEN --note WHY`.",
    )


def _refuse_unpublished(chosen: VersionInfo) -> None:
    if not chosen.verified or SERVICE_TAG not in chosen.tags:
        number = chosen.version
        raise GateError(
            f"is not fully published (publication = {chosen.tags.get('publication', 'absent')})",
            where=_name(chosen),
            remedy=f"Run `hllm publish --version {number}` and `hllm verify --version {number}` first.",
        )


def _drop_candidate(settings: Settings, chosen: VersionInfo) -> None:
    if CANDIDATE in chosen.aliases:
        versions.remove_alias(settings, CANDIDATE)


def _audit(decision: str, by: str, note: str, at: str) -> dict[str, str]:
    return {
        "decided_by": by or user_name(),
        "decided_at": _moment(at),
        "decision_note": note,
        "decision": decision,  # last: with it the rest is on record
    }


def _moment(at: str) -> str:
    if not at:
        return datetime.now(UTC).isoformat(timespec="seconds")
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise ConfigError(
            "is not an ISO 8601 time", where=f"--at {at}", remedy="Like 2026-03-01T12:00:00+00:00."
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if not EARLIEST < moment < datetime.now(UTC) + SKEW:
        raise ConfigError("is no moment at which this can have been decided", where=f"--at {at}")
    return moment.isoformat(timespec="seconds")


def _later(approved_at: str, rejected_at: str) -> bool:
    """Whether an approval came after a rejection; one whose time somebody edited counts as later than any."""
    try:
        rejected = datetime.fromisoformat(rejected_at)
    except ValueError:
        return False
    rejected = rejected if rejected.tzinfo else rejected.replace(tzinfo=UTC)
    return datetime.fromisoformat(approved_at) > rejected


def _name(info: VersionInfo) -> str:
    return f"{info.model} version {info.version}"
