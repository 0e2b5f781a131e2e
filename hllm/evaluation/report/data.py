"""What a report says about the data: sizes, time span, and how the validation went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hllm.artifacts import Manifest
from hllm.data.prepared import Prepared
from hllm.evaluation.report.charts import day, timeline
from hllm.settings import Settings

BARS = 48


def data_summary(
    settings: Settings, folders: Mapping[str, Path], manifests: Mapping[str, Manifest]
) -> dict[str, Any] | None:
    """Rows of (what, value, note), and the chart of events over time where the log has times."""
    if "prepare" not in folders:
        return None
    prepared = Prepared.open(folders["prepare"])
    events = len(prepared.event_items)
    lengths = np.diff(prepared.user_offsets)
    tokens = np.diff(prepared.token_offsets)
    held = [len(prepared.held_out(part)[0]) for part in ("valid", "test")]
    known = np.bincount(prepared.event_items, minlength=prepared.items)
    rows = [
        (
            "events",
            f"{events:,}",
            f"{events / max(prepared.users * prepared.items, 1):.2%} of all user-item pairs",
        ),
        ("users", f"{prepared.users:,}", f"median {np.median(lengths):,.0f} events, most {lengths.max():,}"),
        (
            "items",
            f"{prepared.items:,}",
            f"median {np.median(known):,.0f} events, {int((known == 0).sum()):,} without any",
        ),
        (
            "held out",
            f"{held[0]:,} + {held[1]:,}",
            f"validation + test events ({settings.prepare.split.replace('_', ' ')})",
        ),
        ("item text", f"{tokens.mean():,.0f} tokens", f"on average, at most {tokens.max():,}"),
    ]
    chart = None
    if not has_times(settings):
        rows.append(("time", "order only", "the log has no times: its order stands in for them"))
    else:
        first, last = int(prepared.event_times.min()), int(prepared.event_times.max())
        rows.append(("time", f"{day(first)} to {day(last)}", f"{(last - first) / 86_400:,.0f} days (UTC)"))
        chart = events_over_time(np.asarray(prepared.event_times))
    if "ingest" in manifests:
        before = manifests["ingest"].rows
        rows.append(
            (
                "ingested",
                ", ".join(f"{count:,} {name}" for name, count in before.items()),
                "before validation",
            )
        )
    return {"rows": rows, "chart": chart}


def has_times(settings: Settings) -> bool:
    data = settings.data
    return data.source != "amazon" and not (data.source == "table" and not data.columns.timestamp)


def events_over_time(times_E: np.ndarray) -> Markup:
    """Whole days, weeks, ... so that there are at most some fifty bars."""
    first = int(times_E.min()) // 86_400
    days = int(times_E.max()) // 86_400 - first + 1
    width = next(
        width for width in (1, 7, 14, 28, 91, 182, 364, 10**9) if days <= width * BARS or width == 10**9
    )
    width = max(1, -(-days // BARS)) if width == 10**9 else width
    counts = np.bincount((times_E // 86_400 - first) // width)
    starts = [(first + index * width) * 86_400 for index in range(len(counts))]
    period = {1: "day", 7: "week"}.get(width, f"{width} days")
    return timeline(f"Events per {period}", "events", starts, counts.tolist(), width)


def validation_rows(folder: Path | None) -> list[dict[str, Any]]:
    """validation.json as a table: failures first, then what had rows to complain about, then the rest."""
    path = folder / "validation.json" if folder else None
    if path is None or not path.exists():
        return []
    rows = []
    for check in json.loads(path.read_text("utf-8")):
        failed, total = check.get("failed"), check.get("total")
        if total is not None:
            found, limit = f"{failed:,} of {total:,}", f"{check['limit']:.2%}"
        else:
            found, limit = _plain(check.get("value")), _plain(check.get("limit"))
        rows.append(
            {
                "name": check["name"].replace("_", " "),
                "table": check["table"],
                "column": check.get("column") or "",
                "passed": bool(check["passed"]),
                "found": found,
                "limit": limit,
                "setting": check.get("setting", ""),
                "examples": [str(example) for example in check.get("examples", [])][:3],
                "rank": 0 if not check["passed"] else 1 if failed else 2,
            }
        )
    return sorted(rows, key=lambda row: row["rank"])


def _plain(value: Any) -> str:
    if value is None:
        return "not checked"
    return f"{value:,.4g}" if isinstance(value, int | float) else str(value)
