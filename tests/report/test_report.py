"""The report as a reviewer gets it: complete in itself, honest about what is missing, safe with any text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hllm.errors import DataError
from hllm.evaluation.examples import examples
from hllm.evaluation.gate import judge
from hllm.evaluation.measure import compare, entry, measure
from hllm.evaluation.segments import segments
from hllm.models.common.ranking import HeldOut, rank_by_popularity, rank_by_vectors, training_counts
from hllm.pipeline import keys
from hllm.report import write_report
from hllm.report.charts import forest, nice_ticks, place_labels
from hllm.report.data import validation_rows
from hllm.report.item_map import first_category, principal_components
from hllm.report.steps import read_curves
from hllm.settings import Settings
from hllm.work.artifacts import Manifest
from tests.evaluation.world import prepare, random_histories, unit, write_table
from tests.world import TinySource, run_steps, tiny_settings, write_csv, write_items

EVIL = "<script>alert('x')</script> & \"Söhne\" 🎬"
SETTINGS = Settings.model_validate({"evaluation": {"bootstrap": 50, "example_users": 4}})


class Page(HTMLParser):
    """What a browser would load or run, and what a person would read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action", "background") or (
                tag == "link" and name == "href"
            ):
                self.loads.append(str(value))
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def validation_json(tmp_path_factory):
    """What the real step says of a log that names an unknown item, after a run without it."""
    folder = tmp_path_factory.mktemp("validated")
    log = [("u", "a", 1_600_000_000 + n) for n in range(200)]
    items = write_items(folder / "items.parquet", item_id=["a"], title=["Axe"])
    for events in (log, [*log, ("u", EVIL, 1_600_000_200)]):
        path = write_csv(folder / f"{len(events)}.csv", ["user_id", "item_id", "timestamp"], events)
        sets = {"data.columns": {"texts": ["title"]}, "validation.max_days_stale": 36_500}
        settings = tiny_settings(folder, TinySource(items, path, [], []), **sets)
        if events is log:
            run_steps(settings, "ingest", "validate")
        else:
            with pytest.raises(DataError, match="1 of 201 rows name an item that the catalogue lacks"):
                run_steps(settings, "ingest", "validate")
    return Path(settings.run.root) / "validate" / keys(settings)["validate"] / "validation.json"


@pytest.fixture
def pieces(tmp_path, validation_json):
    """Everything that a finished pipeline leaves behind, small; one title is hostile."""
    rng = np.random.default_rng(4)
    folders = {
        name: tmp_path / name for name in ("validate", "prepare", "evaluate", "embed-hllm-1", "train-hllm-2")
    }
    for folder in folders.values():
        folder.mkdir()
    prepared = prepare(folders["prepare"], random_histories(rng, users=80, items=40), items=40)
    write_table(
        folders["prepare"] / "items.parquet",
        item_index=range(40),
        item_id=[f"i{item}" for item in range(40)],
        title=[EVIL] * 40,
        genres=[f"Comedy{EVIL} Drama", "Action", "Drama", ""] * 10,
        train_events=training_counts(prepared),
    )
    held_out = HeldOut.of(prepared, "test")
    users, items = unit(rng, len(held_out), 8), unit(rng, 40, 8)
    np.save(folders["embed-hllm-1"] / "vectors-00000.npy", items[:25])
    np.save(folders["embed-hllm-1"] / "vectors-00001.npy", items[25:])
    ranks = {
        "popular": rank_by_popularity(training_counts(prepared), held_out),
        "hllm-2": rank_by_vectors(users, items, held_out),
        "sasrec-1": rank_by_vectors(unit(rng, len(held_out), 8), items, held_out),
    }
    metrics = measure(SETTINGS, prepared, held_out, ranks, "hllm-2")
    shown = examples(SETTINGS, prepared, held_out, ranks["hllm-2"], users, items)
    (folders["evaluate"] / "examples.json").write_text(json.dumps(shown))
    shutil.copy(validation_json, folders["validate"])
    rows = [{"at": step, "loss": 7 - step / 100, "lr": 1e-3} for step in range(200)]
    rows[100]["valid_ndcg@10"] = 0.05
    (folders["train-hllm-2"] / "curves.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"at": 2')
    facts = {"parameters": 7_400_000, "steps": 200, "first_loss": 7.0, "last_loss": 5.0}
    manifests = {
        "prepare": manifest("prepare", 12.0, {"items": 40}, {}),
        "train-hllm-2": manifest("train-hllm-2", 3600.0, {}, facts),
    }
    parts = segments(prepared, held_out, SETTINGS.evaluation)
    champion = entry(SETTINGS, held_out, parts, ranks["sasrec-1"])
    champion["comparison"] = compare(SETTINGS, held_out, parts, ranks["hllm-2"], ranks["sasrec-1"])
    return {"metrics": metrics, "folders": folders, "manifests": manifests, "champion": champion}


def manifest(step, seconds, rows, facts):
    return Manifest(step, "key", "digest", "0.1.0", "2026-01-01T00:00:00+00:00", seconds, "x", rows, facts)


def page(tmp_path, pieces, settings=SETTINGS, **changed):
    given = {
        **pieces,
        "links": {"MLflow run": "http://127.0.0.1:5000/#/x", "Data Docs": "file:///docs/index.html"},
    }
    given |= changed
    verdict = judge(settings, given["metrics"], given["champion"])
    path = write_report(tmp_path / "report.html", settings=settings, verdict=verdict, **given)
    return path.read_text("utf-8"), verdict


def test_the_page_loads_nothing_and_runs_nothing(tmp_path, pieces):
    html, _ = page(tmp_path, pieces)
    found = Page(html)
    assert found.loads == []
    assert found.handlers == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(found.tags)
    assert not re.search(r"@import|url\(", html)


def test_texts_of_the_catalogue_stay_texts(tmp_path, pieces):
    html, _ = page(tmp_path, pieces)
    assert "<script" not in html
    assert EVIL in Page(html).text


def test_links_that_would_run_something_are_left_out(tmp_path, pieces):
    html, _ = page(
        tmp_path,
        pieces,
        links={"bad": "javascript:alert(1)", "good": "../mlflow", "docs": "data:text/html,x"},
    )
    assert "javascript:" not in html
    assert "data:text" not in html
    assert 'href="../mlflow"' in html


@pytest.mark.parametrize(("threshold", "sign", "colour"), [(0.0, "✓", "passed"), (99.0, "✗", "failed")])
def test_the_verdict_comes_first_with_every_reason(tmp_path, pieces, threshold, sign, colour):
    settings = Settings.model_validate(
        {"gate": {"min_vs": {"popular": threshold}, "min_vs_champion": 0}, "evaluation": {"bootstrap": 50}}
    )
    html, verdict = page(tmp_path, pieces, settings)
    text = Page(html).text
    assert f"{sign} {verdict.headline}" in text
    assert f'class="verdict {colour}"' in html
    assert all(reason in text for reason in verdict.reasons)
    assert text.index(verdict.headline) < text.index(verdict.reasons[0]) < text.index("Recall@K")


def test_the_numbers_are_those_of_the_metrics(tmp_path, pieces):
    text = Page(page(tmp_path, pieces)[0]).text
    for model in pieces["metrics"]["models"].values():
        for figures in model["overall"].values():
            for figure in figures.values():
                assert f"{figure['value']:.4f}" in text
    ratio = pieces["metrics"]["comparisons"]["popular"]["filtered"]["ndcg@10"]["ratio"]
    assert f"{ratio['value']:.2f} ×" in text


def test_it_shows_validation_examples_curves_map_and_cost(tmp_path, pieces):
    html, _ = page(tmp_path, pieces)
    text = Page(html).text
    assert re.search(r"1 of \d+ expectations failed", text)
    assert "1 of 201" in text
    assert text.index("unknown item") < text.index("freshness")
    assert text.count("chose ") >= 4
    assert "HLLM stage 2: training loss" in text
    assert "HLLM stage 2: NDCG@10 on validation events" in text
    assert "first principal component" in text
    assert "7.4 M parameters, 200 steps, loss 7.000 to 5.000" in text
    assert "0.1003 USD" in text  # 3,612 seconds at 0.10 an hour


def test_checks_of_the_whole_log_are_shown_in_their_units(tmp_path, pieces):
    rows = {row["name"]: row for row in validation_rows(pieces["folders"]["validate"])}
    shown = {name: (row["found"], row["limit"]) for name, row in rows.items()}
    assert shown["unknown item"] == ("1 of 201", "at most 0.10%")
    assert shown["some rows"] == ("200 rows", "at least 1 rows")
    assert shown["volume"] == (
        "100 % of the previous run's rows",
        "at least 50 % of the previous run's rows",
    )
    assert shown["newer than previous"] == (
        "0 days behind the previous run",
        "at most 0 days behind the previous run",
    )
    age, limit = shown["freshness"]
    assert re.fullmatch(r"\d,\d{3} days old", age)
    assert limit == "at most 36,500 days old"
    text = Page(page(tmp_path, pieces)[0]).text
    assert all(part in text for pair in shown.values() for part in pair)
    assert rows["unknown item"]["examples"] == [EVIL]


def test_the_data_docs_are_a_place_in_words_and_a_link_only_where_one_can_work(tmp_path, pieces):
    settings = Settings.model_validate({"run": {"root": "s3://bucket/runs"}, "evaluation": {"bootstrap": 50}})
    pieces["manifests"]["validate"] = manifest("validate", 1.0, {}, {})
    html, _ = page(tmp_path, pieces, settings)
    assert "the Data Docs at s3://bucket/runs/validate/key/data_docs/index.html" in Page(html).text
    assert "file:" not in html
    html, _ = page(tmp_path, pieces, settings, links={"Data Docs": "https://docs.example/index.html"})
    assert html.count('href="https://docs.example/index.html"') == 2
    assert "the Data Docs at" not in html


def test_every_chart_has_a_title_and_a_description(tmp_path, pieces):
    html, _ = page(tmp_path, pieces)
    charts = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(charts) == 8  # 2 metrics, 2 segments, map, loss, validation, events over time
    assert all('role="img" aria-label="' in chart and 'class="title"' in chart for chart in charts)
    assert all('class="axis"' in chart for chart in charts)


def test_missing_pieces_are_left_out_and_said(tmp_path, pieces):
    html, _ = page(tmp_path, pieces, champion=None, folders={}, manifests={}, links={})
    text = Page(html).text
    assert "there is no champion yet" in text
    assert "The prepared data is not at hand" in text
    assert "No validation result is at hand" in text
    assert "No manifests are at hand" in text
    assert 'id="map"' not in html


def test_the_same_inputs_give_the_same_page(tmp_path, pieces):
    assert page(tmp_path, pieces)[0] == page(tmp_path, pieces)[0]


def test_a_log_without_times_shows_no_invented_dates(tmp_path, pieces):
    settings = Settings.model_validate({"data": {"source": "amazon"}, "evaluation": {"bootstrap": 50}})
    text = Page(page(tmp_path, pieces, settings)[0]).text
    assert "order only" in text
    assert "1997" not in text


def test_labels_never_cover_each_other_or_leave_the_picture():
    rng = np.random.default_rng(0)
    spots = [
        (float(x), float(y), f"A long title {row}") for row, (x, y) in enumerate(rng.random((200, 2)) * 300)
    ]
    placed = place_labels(spots, (0.0, 0.0, 300.0, 300.0), most=12)
    boxes = []
    for x, y, anchor, text, _ in placed:
        width = len(text) * 13 * 0.5
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        boxes.append((left, y - 12, left + width, y + 2))
    for row, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= 300
        for b in boxes[:row]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0.153), (0, 0), (-3.2, 8.9), (2.999, 3.001), (0, 123_456), (5, 5)]
)
def test_ticks_are_few_and_enclose_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8


def test_a_chart_without_any_point_is_still_a_chart():
    assert "<svg" in forest("empty", "nothing", [])


def test_a_repeated_step_counts_once_and_a_torn_line_not_at_all(tmp_path):
    path = tmp_path / "curves.jsonl"
    path.write_text('{"at": 1, "loss": 5.0}\n{"at": 2, "loss": NaN}\n{"at": 1, "loss": 4.0}\n{"at": 3, "lo')
    assert read_curves(path) == {"loss": [(1, 4.0)]}


def test_the_map_does_not_depend_on_the_order_of_the_items():
    vectors = unit(np.random.default_rng(0), 50, 6)
    order = np.random.default_rng(1).permutation(50)
    here, share = principal_components(vectors)
    there, _ = principal_components(vectors[order])
    assert np.allclose(here[order], there)
    assert 0 < share[1] <= share[0] <= 1


@pytest.mark.parametrize(
    ("value", "words", "first"),
    [
        ("Comedy|Drama", False, "Comedy"),
        ("Books > Crime", False, "Books"),
        ("Home & Kitchen", False, "Home & Kitchen"),
        ("Animation Children's", True, "Animation"),
        ("", False, ""),
        (None, True, ""),
    ],
)
def test_the_first_of_several_categories(value, words, first):
    assert first_category(value, words) == first


def test_a_model_that_judges_is_shown_beside_what_needs_no_model(tmp_path, pieces):
    def figure(value):
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    models = {"hllm-2": 0.71, "hllm-1": 0.6912, "item-rate": 0.68, "popular": 0.55, "sasrec-1": 0.6}
    labelled = {
        "rows": 1234,
        "liked": 700,
        "users": 90,
        "users_with_one_class": 17,
        "models": {
            label: {name: figure(value) for name in ("auc", "uauc")} for label, value in models.items()
        },
        "differences": {
            label: {name: figure(0.71 - value) for name in ("auc", "uauc")}
            for label, value in models.items()
            if label != "hllm-2"
        },
    }
    metrics = {**pieces["metrics"], "labelled": labelled}
    text = " ".join(Page(page(tmp_path, pieces, metrics=metrics)[0]).text.split())
    for words in (
        "1,234 held-out events with a label, 700 of them liked",
        "17 users whose events are all liked, or none",
        "Share of likes of the item",
        "ModelAUCUAUC HLLM stage 2the candidate0.7100",
        "candidate +0.0188 (−0.0012 to +0.0388)",
    ):
        assert words in text, words
    champion = {**pieces["champion"], "labelled": {"figures": {"auc": figure(0.7), "uauc": figure(0.72)}}}
    champion["labelled"]["difference"] = {"auc": figure(0.01), "uauc": figure(-0.01)}
    gate = Settings.model_validate({"gate": {"metric": "uauc"}, "evaluation": {"bootstrap": 50}})
    html, verdict = page(tmp_path, pieces, settings=gate, metrics=metrics, champion=champion)
    assert verdict.rules[2].reason.startswith("UAUC 0.7100 exceeds 0.98 x the champion's 0.7200")
    assert "Champion0.70000.6800–0.7200candidate +0.0100" in " ".join(Page(html).text.split())
    none = {**labelled, "rows": 0, "models": {label: {} for label in models}, "differences": {}}
    text, _ = page(tmp_path, pieces, metrics={**metrics, "labelled": none})
    assert "there is no AUC" in text
    assert "Telling likes" not in page(tmp_path, pieces)[0]


def test_what_would_change_is_shown_and_safe(tmp_path, pieces):
    item = {"item_id": "i1", "title": EVIL}
    person = {"user_id": EVIL, "events": 1234, "kept": 3, "history": [item], "before": [item], "now": [item]}
    other = {"item_id": "i9", "title": EVIL}
    known = {"item_id": "i2", "title": EVIL, "events": 77, "before": [item], "now": [other]}
    changes = {"asked": 80, "overlap": 0.42, "unchanged": 2, "users": [person], "neighbours": [known]}
    html, _ = page(tmp_path, pieces, champion={**pieces["champion"], "changes": changes})
    assert "<script" not in html
    text = Page(html).text
    assert "4.2 stay on average; 2 users keep all ten" in text
    assert "3 of 10 stay, 1,234 events" in text
    assert "Nearest to well-known items" in text
    assert "What would change" not in Page(page(tmp_path, pieces)[0]).text


def test_what_the_vectors_are_worth_to_a_ranker_is_shown(tmp_path, pieces):
    from hllm.evaluation.ranker_champion import ranking_of
    from tests.ranker.test_compare import written

    ranking = ranking_of(SETTINGS, written(tmp_path / "mine", 0.6), (3, written(tmp_path / "champion", 0.1)))
    text = Page(page(tmp_path, pieces, ranking=ranking)[0]).text
    assert "What it is worth to a ranking model" in text
    for model in ranking["results"]["models"].values():
        assert f"{model['parts']['overall']['auc']['value']:.4f}" in text
    assert "candidate less champion, (b)" in text
    assert "40 % of the test impressions found a user vector" in text
    assert "What it is worth" not in Page(page(tmp_path, pieces)[0]).text
