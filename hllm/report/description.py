"""The text of a registered version: what a reviewer needs to decide in two minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hllm.evaluation.gate import Verdict, name_of
from hllm.evaluation.names import in_sentence, metric_name, model_name
from hllm.evaluation.segments import segment_name
from hllm.report.figures import Against, comparisons
from hllm.report.ranker import gain_in_words, says
from hllm.work.artifacts import Manifest

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
    ranking: Mapping[str, Any] | None = None,
) -> str:
    """Markdown: verdict, numbers, data, what to look at, and where the rest is."""
    models = _models(metrics, champion)
    parts = [
        f"**Gate {'passed' if verdict.passed else 'FAILED'}.** {verdict.headline}",
        "\n".join(f"- {reason}" for reason in verdict.reasons),
        _table(metrics, models, metric),
        _likes(metrics),
        _ranking(ranking),
        _data(manifests, metrics),
        _look_at(metrics, champion, metric),
        f"[The report]({report}) has curves, segments, ten users with their recommendations, and the cost.",
    ]
    found = "\n\n".join(part for part in parts if part)
    return found if len(found) <= LIMIT else found[: LIMIT - 4] + " ..."


def _models(
    metrics: Mapping[str, Any], champion: tuple[int, Mapping[str, Any]] | None
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Label -> (name, entry): the candidate first, then the champion, then the others."""
    candidate, models = metrics["candidate"], metrics["models"]
    found = {candidate: (f"**{model_name(candidate)}** (this version)", models[candidate])}
    if champion:
        found["champion"] = (f"champion (version {champion[0]})", champion[1])
    others = {label: (in_sentence(label), model) for label, model in models.items()}
    return found | {label: other for label, other in others.items() if label != candidate}


def _table(
    metrics: Mapping[str, Any], models: Mapping[str, tuple[str, Mapping[str, Any]]], metric: str
) -> str:
    shown = _columns(metric, metrics["cutoffs"])
    mode, level = metrics["headline"], 100 * metrics.get("confidence", 0.95)
    lines = [f"| {metrics['rows']:,} held-out events, {mode} | " + " | ".join(map(metric_name, shown)) + " |"]
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


def _ranking(ranking: Mapping[str, Any] | None) -> str:
    """What the vectors gain the reference ranker, and whether more than the champion's do."""
    if not ranking:
        return ""

    def gains(results: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{name} {gain_in_words(gain['parts']['overall'].get('auc'))}"
            for gain, name in zip(results["gains"], ("vectors", "fusion on top"), strict=False)
        )

    mine, rows = gains(ranking["results"]), ranking["results"]["rows"]["test"]
    said = [f"**Ranking gain.** AUC of the reference ranker on {rows:,} impressions: {mine}."]
    if ranking["champion"]:
        said.append(f"The champion's (version {ranking['version']}): {gains(ranking['champion'])}.")
        for variant, name in (("vectors", "with vectors"), ("fusion", "with fusion")):
            auc = ranking["differences"].get(variant, {}).get("auc")
            if auc:
                said.append(f"Candidate less champion {name}: {gain_in_words(auc)}, {says(auc)}.")
        if not ranking["differences"]:
            said.append("They were tested on other impressions: not comparable.")
    return " ".join(said)


def _data(manifests: Mapping[str, Manifest], metrics: Mapping[str, Any]) -> str:
    rows = manifests["prepare"].rows if "prepare" in manifests else {}
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in rows.items())
    exported = manifests.get("export")
    newest = (
        f", newest event seen {exported.facts['as_of']}" if exported and "as_of" in exported.facts else ""
    )
    return f"**Data.** {counts or format(metrics['catalogue'], ',') + ' items'}{newest}."


def _look_at(metrics: Mapping[str, Any], champion: tuple[int, Mapping[str, Any]] | None, metric: str) -> str:
    """Segments where the candidate is clearly worse: by the report's own rule, so that the two agree."""
    entries = {**metrics["models"], **({"champion": champion[1]} if champion else {})}
    listed = []
    for row in comparisons(metrics, champion[1] if champion else None):
        if row.role != "stage" and row.label in entries:
            worse = _worse_segments(metrics, row, entries[row.label], metric)
            if worse:
                rival = name_of(row.label)
                listed.append(f"- {metric_name(metric)} is worse than {rival}'s for {'; '.join(worse)}")
    nothing = "- in no segment is it clearly worse than the models beside it"
    return "**What to look at.**\n" + ("\n".join(listed) or nothing)


def _worse_segments(
    metrics: Mapping[str, Any], row: Against, theirs: Mapping[str, Any], metric: str
) -> list[str]:
    mode, mine = metrics["headline"], metrics["models"][metrics["candidate"]]
    found = []
    for segment in row.segments_that_are("worse", mode, metric):
        ours, other = (entry["segments"][segment][mode][metric]["value"] for entry in (mine, theirs))
        events = mine["segments"][segment]["rows"]
        found.append(f"{segment_name(segment)} ({ours:.4f} against {other:.4f}, {events:,} events)")
    return found


def _columns(metric: str, cutoffs: Sequence[int]) -> list[str]:
    kind, _, cutoff = metric.partition("@")
    other = "recall" if kind == "ndcg" else "ndcg"
    return list(dict.fromkeys([metric, f"{other}@{cutoff}", f"recall@{max(cutoffs)}"]))


def _figure(figure: Mapping[str, float] | None) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" if figure else "-"
