"""The report of one candidate: a self-contained page from which a person decides in two minutes.

Everything on it comes from finished outputs; this file puts it into words and numbers, `charts.py` draws,
`page.html` lays out. Texts from the catalogue are escaped by the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hllm.evaluation.gate import Verdict
from hllm.evaluation.names import metric_name, ranking_metric
from hllm.report.data import data_summary, docs_location, validation_rows
from hllm.report.figures import (
    comparisons,
    figure_table,
    forest_charts,
    labelled_table,
    models_in_order,
    segment_charts,
    segment_table,
)
from hllm.report.ranker import ranking_section
from hllm.report.steps import cost_table, training_curves
from hllm.report.words import advice
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, write_atomically


def write_report(
    path: Path,
    *,
    settings: Settings,
    metrics: Mapping[str, Any],
    verdict: Verdict,
    champion: Mapping[str, Any] | None,
    folders: Mapping[str, Path],
    manifests: Mapping[str, Manifest],
    links: Mapping[str, str],
    ranking: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page. Parts whose inputs are missing are left out and say so."""
    import jinja2

    shown = ranking_metric(settings.gate.metric, metrics["cutoffs"])
    settings = settings.model_copy(update={"gate": settings.gate.model_copy(update={"metric": shown})})
    models = models_in_order(metrics, champion)
    against = comparisons(metrics, champion)
    validation = validation_rows(folders.get("validate"))
    links = {name: url for name, url in links.items() if _leads_somewhere(url)}
    other = "unfiltered" if metrics["headline"] == "filtered" else "filtered"
    values = {
        "name": settings.run.name,
        "model_name": settings.mlflow.model_name,
        "verdict": verdict,
        "metric": metric_name(settings.gate.metric),
        "gate_metric": settings.gate.metric,
        "metrics": metrics,
        "level": f"{100 * metrics.get('confidence', 0.95):g} %",
        "tiles": _tiles(settings, models, against, metrics),
        "advice": advice(settings, metrics, against, validation, manifests),
        "tables": [(mode, figure_table(metrics, models, mode)) for mode in (metrics["headline"], other)],
        "ratios": [row for row in against if row.overall],
        "forests": forest_charts(settings, models, metrics),
        "labelled": labelled_table(metrics, champion),
        "segments": segment_table(settings, models, against, metrics),
        "segment_charts": segment_charts(settings, models, metrics),
        "curves": training_curves(folders),
        "data": data_summary(settings, folders, manifests),
        "validation": validation,
        "docs": next((url for name, url in links.items() if "docs" in name.lower()), ""),
        "docs_location": docs_location(settings, manifests),
        "map": _map(settings, folders),
        "examples": _examples(folders),
        "ranking": ranking_section(ranking),
        "changes": (champion or {}).get("changes"),
        "costs": cost_table(settings, manifests),
        "links": links,
        "made": max((manifest.created_at for manifest in manifests.values()), default=""),
        "code_version": next((manifest.code_version for manifest in manifests.values()), ""),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_atomically(path, environment.get_template("page.html").render(values).encode())
    return path


def _tiles(
    settings: Settings, models: Sequence[Any], against: Sequence[Any], metrics: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The gate's metric, and the candidate against each rival in plain words."""
    metric, mode = settings.gate.metric, metrics["headline"]
    figure = models[0].entry["overall"][mode][metric]
    tiles = [
        {
            "label": metric_name(metric),
            "value": f"{figure['value']:.4f}",
            "note": f"{figure['low']:.4f} to {figure['high']:.4f}",
            "tone": "plain",
        }
    ]
    for row in against:
        if row.role == "stage":
            continue
        ratio = row.ratio(mode, metric)
        if ratio is None:
            tiles.append({"label": f"against {row.name}", "value": "–", "note": row.missing, "tone": "plain"})
            continue
        tiles.append(
            {
                "label": f"against {row.name}",
                "value": f"{ratio['value']:.2f} ×",
                "note": f"{ratio['low']:.2f} to {ratio['high']:.2f}: {row.says(mode, metric)}",
                "tone": {"better": "good", "worse": "bad"}.get(row.says(mode, metric), "plain"),
            }
        )
    return tiles


def _map(settings: Settings, folders: Mapping[str, Path]) -> Any:
    from hllm.report.item_map import item_map

    vectors = folders.get(f"embed-{settings.model.family}-1")
    if vectors is None or "prepare" not in folders:
        return None
    from hllm.data.prepared import Prepared

    return item_map(Prepared.open(folders["prepare"]), vectors, settings.run.seed)


def _examples(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    path = folders["evaluate"] / "examples.json" if "evaluate" in folders else None
    return json.loads(path.read_text("utf-8")) if path and path.exists() else []


def _leads_somewhere(url: str) -> bool:
    """A link may lead to a page, never run something. A file of the machine that made the report is none:
    the report is read in MLflow, from S3, on other machines."""
    scheme = url.partition(":")[0].lower()
    return scheme in ("http", "https") or ":" not in url.split("/")[0]
