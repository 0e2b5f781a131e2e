"""What a report says about the data: sizes, time span, and how the validation went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hllm.data.prepared import Prepared
from hllm.data.readers import has_times
from hllm.report.charts import day, timeline
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store

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
    if not has_times(settings.data):
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
    """validation.json as a table: failures first, then what had rows to complain about, then the rest.

    A rule found so many rows of a table; a check of the log as a whole found a value in its unit.
    """
    path = folder / "validation.json" if folder else None
    if path is None or not path.exists():
        return []
    rows = []
    for check in json.loads(path.read_text("utf-8")):
        if "unit" in check:
            found, limit = f"{_number(check['value'])} {check['unit']}", _bounds(check)
        else:
            found, limit = f"{check['failed']:,} of {check['total']:,}", f"at most {check['limit']:.2%}"
        rows.append(
            {
                "name": check["name"].replace("_", " "),
                "table": check["table"],
                "column": check["column"],
                "passed": bool(check["passed"]),
                "found": found,
                "limit": limit,
                "setting": check["setting"],
                "examples": [str(example) for example in check.get("examples", [])][:3],
                "rank": 0 if not check["passed"] else 1 if check.get("failed") else 2,
            }
        )
    return sorted(rows, key=lambda row: row["rank"])


def _bounds(check: Mapping[str, Any]) -> str:
    """`at least 50 % of the previous run's rows`."""
    bounds = {"at least": check["least"], "at most": check["most"]}
    return " and ".join(
        f"{word} {_number(bound)} {check['unit']}" for word, bound in bounds.items() if bound is not None
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:,.3g}"


def docs_location(settings: Settings, manifests: Mapping[str, Manifest]) -> str:
    """Where the Data Docs lie, as a person finds them: they stay in the output of `validate`."""
    if "validate" not in manifests:
        return ""
    output = Store(settings.run.root).location("validate", manifests["validate"].key)
    return f"{output}/data_docs/index.html"
