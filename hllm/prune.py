"""`hllm prune`: copies of the log that nobody will read again make room.

Whenever the source has changed, `ingest`, `validate` and `prepare` write it anew: every hour, where
`hllm_items` runs. Only outputs of these three are removed, never a training, vectors, an evaluation or a
publication. Kept is
    - what a registered version was made from: refreshes read it, of the version that serves and of whichever
      `hllm rollback` or `hllm publish` goes back to
    - what a pipeline may still read of which a step runs, or has run within `keep_days`
    - what these settings read now, and the newest of each step: for `hllm watch` and the next validation
    - what is younger than `keep_days`, or was relied on by a step since (even if no step has run: all that a
      pipeline has reused so far), or is being written
Steps find what they read by a key, made from their settings and the source as it is now. So a copy that is
missed after all is of a source that is still there, and the same commands make it again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta

import typer
from tabulate import tabulate

from hllm.errors import HLLMError
from hllm.pipeline import PRUNED, keys
from hllm.registry.outputs import Output, end_lost_runs, outputs_at_work, outputs_of_versions, require_known
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store
from hllm.work.termination import say


def prune(settings: Settings, keep_days: int, dry_run: bool = False) -> list[Manifest]:
    """Say what is not needed any more, and remove it unless `dry_run`; returns what that was.

    Raises:
        ConfigError: MLflow knows none of these outputs, or not the versions that were registered from them:
            nothing is removed.
        DataError: the source is not there, or a record is damaged: nothing is removed.
        InfraError: MLflow or the store does not answer.
    """
    store, since = Store(settings.run.root), datetime.now(UTC) - timedelta(days=keep_days)
    if not dry_run:
        _finish_broken_off(store)
    found = [manifest for step in PRUNED for manifest in store.finished(step)]
    reasons = _reasons(settings, store, found, since)
    going = [each for each in found if (each.step, each.key) not in reasons]
    sizes = {each.key: store.size(each.step, each.key) / 1e6 for each in going}
    if going:
        require_known(settings, {(each.step, each.key) for each in found})
        rows = [(each.step, each.key, each.created_at[:16], f"{sizes[each.key]:,.1f}") for each in going]
        typer.echo(tabulate(rows, headers=("step", "key", "made", "MB"), disable_numparse=True))
    if not dry_run:
        going = [each for each in going if _removed(store, each, since)]
        if ended := end_lost_runs(settings, since):  # now: before, a full disk may have had no room for it
            typer.echo(f"prune: ended {ended} runs in MLflow whose processes are gone")
    why = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons.values()).items())
    say(
        f"prune: {'would free' if dry_run else 'freed'} {sum(sizes[each.key] for each in going):,.1f} MB, "
        f"{len(going)} outputs of {store.root}; kept {len(reasons)}{f': {why}' if why else ''}"
    )
    return going


def _finish_broken_off(store: Store) -> None:
    """What an earlier prune had begun to remove when its process was killed."""
    for step in PRUNED:
        for key in store.half_forgotten(step):
            with suppress(HLLMError, PermissionError), store.lock(step, key):
                store.forget(step, key)


def _reasons(settings: Settings, store: Store, found: list[Manifest], since: datetime) -> dict[Output, str]:
    """Why an output is kept; of those that nothing speaks for, nothing."""
    newest = {(each.step, each.facts.get("run")): each for each in found}  # they come oldest first
    young = [each for each in found if datetime.fromisoformat(each.created_at) > since]
    rules: dict[str, Collection[Output]] = {
        "of registered versions": outputs_of_versions(settings),
        "of pipelines at work": outputs_at_work(settings, since),
        "of these settings": keys(settings).items(),
        "newest": {(each.step, each.key) for each in newest.values()},
        "younger": {(each.step, each.key) for each in young},
    }
    reasons = {}
    for each in found:
        output = (each.step, each.key)
        why = next((reason for reason, outputs in rules.items() if output in outputs), "")
        if not why and _used(store, output, since):
            why = "used lately"
        if why:
            reasons[output] = why
    return reasons


def _used(store: Store, output: Output, since: datetime) -> bool:
    last = store.used(*output)
    return last is not None and last > since


def _removed(store: Store, output: Manifest, since: datetime) -> bool:
    """Remove it, unless somebody writes it anew or has come to need it meanwhile; whether it is gone."""
    step, key = output.step, output.key
    folder = store.folder(step, key)
    with ExitStack() as held:
        try:
            held.enter_context(store.lock(step, key))
        except HLLMError as error:
            typer.echo(f"prune: left alone: {error.first_line}", err=True)
            return False
        if why := _hindrance(store, output, since):
            typer.echo(f"prune: left alone: {store.location(step, key)}: {why}", err=True)
            return False
        with suppress(PermissionError):
            store.forget(step, key)
    if folder.exists():
        typer.echo(f"prune: cannot be removed: {folder}", err=True)
    return not folder.exists()


def _hindrance(store: Store, output: Manifest, since: datetime) -> str:
    """Why it must not be removed after all, or "". Asked while no other process can write it."""
    if store.manifest(output.step, output.key) != output:
        return "it was made anew, or removed, meanwhile"
    if _used(store, (output.step, output.key), since):
        return "a step has come to need it meanwhile"
    folder = store.folder(output.step, output.key)
    if folder.is_symlink():
        return "it is a link, whose files would stay"
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())] if folder.exists() else []
    if not all(os.access(each, os.W_OK | os.X_OK) for each in folders):
        return "not all of it may be removed by this user"
    return ""
