"""What a reviewer reads first must say the same as the report behind it."""

from __future__ import annotations

import numpy as np
import pytest

from hllm.evaluation.gate import judge
from hllm.evaluation.measure import compare, entry, measure
from hllm.evaluation.segments import segments
from hllm.models.common.ranking import HeldOut, Ranks
from hllm.report.description import describe
from hllm.report.figures import comparisons
from hllm.settings import Settings
from tests.evaluation.world import prepare

SETTINGS = Settings.model_validate({"evaluation": {"bootstrap": 200, "cold_user_events": 0}})
USERS = 200


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 30, 12).tolist() for _ in range(USERS)]
    prepared = prepare(tmp_path_factory.mktemp("prepared"), histories, items=30)
    return prepared, HeldOut.of(prepared, "test")


def described(held_out, mine, sasrec, champion=None):
    prepared, events = held_out
    ranks = {
        label: Ranks(rank, rank)
        for label, rank in {"hllm-2": mine, "hllm-1": mine, "sasrec-1": sasrec, "popular": mine}.items()
    }
    metrics = measure(SETTINGS, prepared, events, ranks, "hllm-2")
    serving = None
    if champion is not None:
        parts, other = segments(prepared, events, SETTINGS.evaluation), Ranks(champion, champion)
        serving = entry(SETTINGS, events, parts, other)
        serving["comparison"] = compare(SETTINGS, events, parts, ranks["hllm-2"], other)
    verdict = judge(SETTINGS, metrics, serving)
    text = describe(
        metrics, verdict, (3, serving) if serving else None, {}, metric="ndcg@10", report="#/report.html"
    )
    return text, metrics, serving


def test_models_are_called_as_in_the_report(held_out):
    text, _, _ = described(held_out, np.full(USERS, 5), np.full(USERS, 5))
    assert "| **HLLM stage 2** (this version) |" in text
    assert "| HLLM stage 1 |" in text
    assert "hllm-2" not in text
    assert "hllm-1" not in text


def test_a_segment_is_worse_only_where_the_report_says_so_too(held_out):
    """A little behind everywhere is no clear difference; far behind is."""
    rng = np.random.default_rng(2)
    mine = rng.integers(1, 12, USERS)
    almost = np.where(rng.random(USERS) < 0.02, np.maximum(mine - 1, 1), mine)
    text, metrics, _ = described(held_out, mine, almost)
    values = [model["overall"]["filtered"]["ndcg@10"]["value"] for model in metrics["models"].values()]
    assert max(values) > values[0]  # behind by a little
    assert "in no segment is it clearly worse" in text
    text, metrics, serving = described(held_out, mine, np.ones(USERS, int), champion=np.ones(USERS, int))
    for row in comparisons(metrics, serving):
        for segment in row.segments_that_are("worse", "filtered", "ndcg@10"):
            rows = metrics["models"]["hllm-2"]["segments"][segment]["rows"]
            assert f"{rows:,} events" in text
    for rival in ("SASRec", "the champion"):
        line = next(line for line in text.splitlines() if f"- NDCG@10 is worse than {rival}'s for" in line)
        assert "long tail users (0." in line
