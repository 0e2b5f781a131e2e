"""The text of a registered version: what a reviewer needs to decide in two minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hllm.artifacts import Manifest
from hllm.evaluation.gate import NAMES, Verdict

LIMIT = 4900
"""MLflow's databases keep 5,000 characters."""


def describe(
    metrics: Mapping[str, Any],
    verdict: Verdict,
    champion: tuple[int, Mapping[str, Any]] | None,
    manifests: Mapping[str, Manifest],
    *,
    metric: str,
    report: str,
) -> str:
    """Markdown: verdict, numbers, data, what to look at, and where the rest is."""
    models = _models(metrics, champion)
    parts = [
        f"**Gate {'passed' if verdict.passed else 'FAILED'}.** {verdict.headline}",
        "\n".join(f"- {reason}" for reason in verdict.reasons),
        _table(metrics, models, metric),
        _likes(metrics),
        _data(manifests, metrics),
        _look_at(metrics, models, metric),
        f"[The report]({report}) has curves, segments, ten users with their recommendations, and the cost.",
    ]
    found = "\n\n".join(part for part in parts if part)
    return found if len(found) <= LIMIT else found[: LIMIT - 4] + " ..."


def _models(
    metrics: Mapping[str, Any], champion: tuple[int, Mapping[str, Any]] | None
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Label -> (name, entry): the candidate first, then the champion, then the others."""
    candidate, models = metrics["candidate"], metrics["models"]
    found = {candidate: (f"**{candidate}** (this version)", models[candidate])}
    if champion:
        found["champion"] = (f"champion (version {champion[0]})", champion[1])
    others = {label: (NAMES.get(label, label), model) for label, model in models.items()}
    return found | {label: other for label, other in others.items() if label != candidate}


def _table(
    metrics: Mapping[str, Any], models: Mapping[str, tuple[str, Mapping[str, Any]]], metric: str
) -> str:
    shown = _columns(metric, metrics["cutoffs"])
    mode, level = metrics["headline"], 100 * metrics.get("confidence", 0.95)
    lines = [f"| {metrics['rows']:,} held-out events, {mode} | " + " | ".join(map(_title, shown)) + " |"]
    lines.append("|---|" + "---|" * len(shown))
    for name, entry in models.values():
        figures = entry["overall"][mode]
        lines.append(f"| {name} | " + " | ".join(_figure(figures.get(column)) for column in shown) + " |")
    return "\n".join(lines) + f"\n\nIn brackets: {level:g} % bootstrap intervals."


def _likes(metrics: Mapping[str, Any]) -> str:
    """Of a discriminative model: how well it tells likes from dislikes."""
    found = metrics.get("labelled")
    if not found:
        return ""
    figures = found["models"][metrics["candidate"]]
    shown = ", ".join(f"{name.upper()} {_figure(figure)}" for name, figure in figures.items())
    users = f"{found['users']:,} users ({found['users_with_one_class']:,} with one class only)"
    return (
        f"**Likes.** {shown or 'no AUC'} on {found['rows']:,} labelled held-out events of {users}. "
        "The deployed model also takes `candidates` and answers with probabilities."
    )


def _data(manifests: Mapping[str, Manifest], metrics: Mapping[str, Any]) -> str:
    rows = manifests["prepare"].rows if "prepare" in manifests else {}
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in rows.items())
    exported = manifests.get("export")
    newest = (
        f", newest event seen {exported.facts['as_of']}" if exported and "as_of" in exported.facts else ""
    )
    return f"**Data.** {counts or format(metrics['catalogue'], ',') + ' items'}{newest}."


def _look_at(
    metrics: Mapping[str, Any], models: Mapping[str, tuple[str, Mapping[str, Any]]], metric: str
) -> str:
    mode, candidate = metrics["headline"], metrics["candidate"]
    mine = models[candidate][1]["segments"]
    worse: list[str] = []
    for label in ("champion", "sasrec-1", "popular"):
        if label not in models or label == candidate:
            continue
        theirs = models[label][1]["segments"]
        behind = []
        for name in mine.keys() & theirs.keys():
            ours, other = _value(mine[name], mode, metric), _value(theirs[name], mode, metric)
            if ours < other:  # false where a segment is empty (nan)
                segment = name.replace(":", " ").replace("_", " ")
                behind.append(f"{segment} ({ours:.4f} against {other:.4f}, {mine[name]['rows']:,} events)")
        if behind:
            worse.append(
                f"- {_title(metric)} is behind {NAMES.get(label, label)} on {'; '.join(sorted(behind))}"
            )
    listed = "\n".join(worse) if worse else "- no segment is behind the champion, SASRec or most-popular"
    return f"**What to look at.**\n{listed}"


def _columns(metric: str, cutoffs: Sequence[int]) -> list[str]:
    kind, _, cutoff = metric.partition("@")
    other = "recall" if kind == "ndcg" else "ndcg"
    return list(dict.fromkeys([metric, f"{other}@{cutoff}", f"recall@{max(cutoffs)}"]))


def _title(metric: str) -> str:
    kind, _, cutoff = metric.partition("@")
    return f"{'NDCG' if kind == 'ndcg' else kind.capitalize()}@{cutoff}"


def _figure(figure: Mapping[str, float] | None) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" if figure else "-"


def _value(segment: Mapping[str, Any], mode: str, metric: str) -> float:
    return float(segment.get(mode, {}).get(metric, {}).get("value", math.nan))
