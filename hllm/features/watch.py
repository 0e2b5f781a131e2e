"""`hllm watch`: is what ranking models read now fresh, complete and sound? And if not, what to do.

ROOT/watch/index.html     a page for people, with nothing to load
ROOT/watch/metrics.prom   Prometheus' text format, for a textfile collector
ROOT/watch/history.jsonl  one line per look: how the numbers moved
"""

from __future__ import annotations

import contextlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import typer

from hllm.errors import ConfigError, GateError
from hllm.features.monitors import Look, Watched, folder_of, trouble
from hllm.features.views import service_name
from hllm.registry.versions import VersionInfo, serving_version
from hllm.settings import Settings
from hllm.work.artifacts import Store, sweep, write_atomically
from hllm.work.objects import read_object, upload
from hllm.work.termination import say

PAGE, METRICS, HISTORY = "index.html", "metrics.prom", "history.jsonl"
SHOWN = 30
"""Looks of the past on the page."""


def watch(settings: Settings) -> list[Look]:
    """Look at the serving version; write the page, the metrics and one more line of history.

    Raises:
        ConfigError: nothing serves.
        GateError: a limit is passed, or something could not be looked at or written; all of it, with what
            to do.
    """
    info = serving_version(settings)
    if info is None:
        raise ConfigError(
            "no version serves: there is nothing to watch",
            where=settings.mlflow.model_name,
            remedy="Approve one in Airflow, or run `hllm promote`.",
        )
    now = datetime.now(UTC).replace(microsecond=0)
    looks = list(Watched(settings, info, now).looks())
    try:
        page = _write(settings, info, now, looks)
    except Exception as error:
        page = "not written"
        looks.append(trouble("page_unwritten", "the page could not be written", error))
    alerts = [look for look in looks if look.alert]
    for look in looks:
        typer.echo(
            f"watch: {look.title}: {look.value:.4g} {f'({look.limit})' if look.limit else ''}".rstrip()
        )
    if alerts:
        raise GateError(
            f"{len(alerts)} of {len(looks)} limits are passed: {', '.join(look.name for look in alerts)}",
            where=f"watch: {info.model} version {info.version}",
            remedy="\n  ".join([*(look.says for look in alerts), f"The page: {page}"]),
        )
    say(f"watch: version {info.version} is fresh, complete and sound -> {page}")
    return looks


def prometheus(info: VersionInfo, now: datetime, looks: list[Look]) -> str:
    """Prometheus' text exposition format: a gauge per look, one for its alert, and when it was."""
    labels = f'model="{_escaped(info.model)}",version="{info.version}"'
    lines = []
    for look in looks:
        name = f"hllm_watch_{look.name}"
        lines += [
            f"# HELP {name} {look.title}",
            f"# TYPE {name} gauge",
            f"{name}{{{labels}}} {look.value:.10g}",
        ]
    alert = "hllm_watch_alert"
    lines += [f"# HELP {alert} 1 while the limit of a look is passed", f"# TYPE {alert} gauge"]
    lines += [f'{alert}{{{labels},look="{look.name}"}} {int(look.alert)}' for look in looks if look.limit]
    seen = "hllm_watch_last_look_seconds"
    lines += [
        f"# HELP {seen} when this was looked at",
        f"# TYPE {seen} gauge",
        f"{seen}{{{labels}}} {now.timestamp():.0f}",
    ]
    return "\n".join(lines) + "\n"


def _write(settings: Settings, info: VersionInfo, now: datetime, looks: list[Look]) -> str:
    folder, outputs = folder_of(settings), Store(settings.run.root)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if outputs.remote and (past := read_object(f"{outputs.root}/watch/{HISTORY}")):
        write_atomically(folder / HISTORY, past)  # a pod finds nothing on its own disk
    seen = {"at": now.isoformat(), "version": info.version, **{look.name: look.value for look in looks}}
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write("\n" * _cut_off(folder / HISTORY) + json.dumps(seen) + "\n")
    write_atomically(folder / METRICS, prometheus(info, now, looks).encode())
    write_atomically(folder / PAGE, _page(info, now, looks, _past(folder / HISTORY)).encode())
    if not outputs.remote:
        return str(folder / PAGE)
    for name in (PAGE, METRICS, HISTORY):
        upload(folder / name, f"{outputs.root}/watch/{name}")
    return f"{outputs.root}/watch/{PAGE}"


def _cut_off(path: Path) -> bool:
    """Whether the last line was not written to its end: the next one begins on a line of its own."""
    with path.open("rb") as file:
        return path.stat().st_size > 0 and (file.seek(-1, 2), file.read(1))[1] != b"\n"


def _page(info: VersionInfo, now: datetime, looks: list[Look], past: list[dict[str, float]]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("watch.html").read_text("utf-8"))
    return template.render(
        info=info,
        service=service_name(info.version),
        now=now,
        looks=looks,
        alerts=[look for look in looks if look.alert],
        past={look.name: _line([one[look.name] for one in past if look.name in one]) for look in looks},
    )


def _past(path: Path) -> list[dict[str, float]]:
    """Points of earlier looks; a line that was cut off, or that a hand changed, is none."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines()[-SHOWN:]:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            points = dict(json.loads(line))
            found.append({name: float(value) for name, value in points.items() if _is_number(value)})
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _line(values: list[float], width: int = 120, height: int = 24) -> str:
    """The points of a small line chart."""
    low, high = min(values), max(values)
    step = width / max(len(values) - 1, 1)
    return " ".join(
        f"{at * step:.1f},{height - 2 - (value - low) / ((high - low) or 1) * (height - 4):.1f}"
        for at, value in enumerate(values)
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
