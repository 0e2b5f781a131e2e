from __future__ import annotations

import pytest

from hllm.errors import ConfigError, DataError
from hllm.evaluation.gate import judge
from hllm.settings import Settings


def model(value, recall=0.5):
    def figures(ndcg):
        return {
            "ndcg@10": {"value": ndcg, "low": 0.0, "high": 1.0},
            "recall@10": {"value": recall, "low": 0.0, "high": 1.0},
        }

    return {"overall": {"filtered": figures(value), "unfiltered": figures(0.0)}, "segments": {}}


def metrics(candidate=0.08, popular=0.045, sasrec=0.07, label="hllm-2"):
    models = {"popular": model(popular), "sasrec-1": model(sasrec)}
    models[label] = model(candidate)
    return {"candidate": label, "headline": "filtered", "rows": 943, "catalogue": 1682, "models": models}


def settings(**gate):
    return Settings.model_validate({"gate": gate, "model": {"baselines": ["sasrec"]}})


@pytest.mark.parametrize(
    ("gate", "values", "champion", "passed"),
    [
        ({}, {}, None, True),
        ({}, {"candidate": 0.04}, None, False),
        ({"min_vs": {"popular": 2.0}}, {}, None, False),
        ({"min_vs": {"popular": 0}}, {"candidate": 0.04}, None, True),
        ({}, {"candidate": 0.06}, None, True),  # worse than SASRec: reported, not required by default
        ({"min_vs": {"sasrec": 1.0}}, {"candidate": 0.06}, None, False),
        ({"min_vs": {"sasrec": 1.1}}, {}, None, True),
        ({}, {}, 0.081, True),  # within 2 % of the champion
        ({}, {}, 0.09, False),
        ({"min_vs_champion": 0}, {}, 0.09, True),
        ({"min_vs_champion": 1.0}, {}, 0.08, False),  # equal does not exceed
        ({}, {"candidate": 0.0, "popular": 0.0}, None, False),
        ({"metric": "recall@10", "min_vs": {"popular": 0.9}}, {"candidate": 0.0}, None, True),
    ],
)
def test_each_rule_decides_by_its_threshold(gate, values, champion, passed):
    verdict = judge(settings(**gate), metrics(**values), None if champion is None else model(champion))
    assert verdict.passed is passed
    assert verdict.passed is not any(rule.outcome == "failed" for rule in verdict.rules)
    assert ("failed" in verdict.headline) is not passed
    assert len(verdict.reasons) == 3


def test_a_failure_names_the_rival_and_both_numbers():
    verdict = judge(settings(), metrics(), model(0.09))
    assert verdict.headline == (
        "HLLM stage 2 failed the gate against the champion: NDCG@10 0.0800 on 943 held-out events"
    )
    assert verdict.reasons[-1] == "NDCG@10 0.0800 does not exceed 0.98 x the champion's 0.0900"


def test_paired_ratios_are_shown_where_they_are_known():
    found = metrics()
    ratio = {"value": 1.78, "low": 1.5, "high": 2.1}
    found["comparisons"] = {"popular": {"filtered": {"ndcg@10": {"ratio": ratio}}}}
    champion = model(0.07) | {"comparison": {"filtered": {"ndcg@10": {"ratio": None}}}}
    reasons = judge(settings(), found, champion).reasons
    assert reasons[0] == (
        "NDCG@10 0.0800 exceeds 1 x most popular's 0.0450, ratio 1.78 (95 % interval 1.50 to 2.10)"
    )
    assert "ratio" not in reasons[2]


def likes(champion=0.70):
    """A discriminative candidate; popularity ranks well and knows nothing of likes."""
    found = metrics(candidate=0.01, popular=0.09)
    models = {"hllm-2": 0.71, "popular": 0.55, "sasrec-1": 0.6}
    gaps = {label: {"uauc": {"value": 0.71 - auc, "low": 0.1, "high": 0.2}} for label, auc in models.items()}
    figures = {label: {"uauc": {"value": auc, "low": 0.0, "high": 1.0}} for label, auc in models.items()}
    found["labelled"] = {"rows": 17_000, "models": figures, "differences": gaps}
    theirs = {
        "figures": {"uauc": {"value": champion, "low": 0.0, "high": 1.0}},
        "difference": {"uauc": {"value": 0.71 - champion, "low": -0.01, "high": 0.03}},
    }
    return found, model(0.5) | {"labelled": theirs}


def test_a_model_that_judges_passes_by_how_well_it_judges():
    found, champion = likes()
    verdict = judge(settings(metric="uauc"), found, champion)
    assert verdict.passed
    assert verdict.headline == "HLLM stage 2 passed the gate: UAUC 0.7100 on 17,000 labelled held-out events"
    assert verdict.reasons[0] == (
        "UAUC 0.7100 exceeds 1 x most popular's 0.5500, difference +0.1600 (95 % interval +0.1000 to +0.2000)"
    )
    assert "0.98 x the champion's 0.7000, difference +0.0100" in verdict.reasons[2]
    assert not judge(settings(metric="uauc"), *likes(champion=0.74)).passed
    assert not judge(settings(), found, None).passed  # NDCG is there as well, and is worse than popularity's


def test_an_auc_that_was_not_measured_is_a_settings_error():
    with pytest.raises(ConfigError, match="uauc is not among the evaluated metrics"):
        judge(settings(metric="uauc"), metrics(), None)


def test_sasrec_as_candidate_is_not_compared_with_itself():
    verdict = judge(settings(min_vs={"sasrec": 1.0}), metrics(label="sasrec-1"), None)
    assert verdict.passed
    assert verdict.reasons[1:] == [
        "SASRec is the candidate itself",
        "there is no champion yet: nothing to compare",
    ]


def test_a_metric_that_was_not_evaluated_is_a_settings_error():
    with pytest.raises(ConfigError, match=r"ndcg@7 is not among the evaluated metrics(.|\n)*ndcg@10"):
        judge(settings(metric="ndcg@7"), metrics(), None)


def test_a_baseline_that_is_not_trained_is_no_rule():
    found = metrics()
    del found["models"]["sasrec-1"]
    alone = Settings.model_validate({"gate": {"metric": "ndcg@10"}, "model": {"baselines": []}})
    assert "sasrec-1" not in [rule.against for rule in judge(alone, found, None).rules]
    asked = {"gate": {"metric": "ndcg@10", "min_vs": {"sasrec": 0.9}}, "model": {"baselines": []}}
    with pytest.raises(ConfigError, match="which was not evaluated"):
        judge(Settings.model_validate(asked), found, None)


def test_without_the_baselines_there_is_no_verdict():
    found = metrics()
    del found["models"]["sasrec-1"]
    with pytest.raises(DataError, match="sasrec has not been evaluated"):
        judge(settings(), found, None)
    with pytest.raises(DataError, match="not a finite number"):
        judge(settings(), metrics(candidate=float("nan")), None)
