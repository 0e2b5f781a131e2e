"""Discriminative recommendation: one call for all candidates gives what each gives alone, and nothing is
computed twice for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hllm.errors import Terminated
from hllm.models.common.backbone import build_decoder
from hllm.models.common.history import UNKNOWN_ITEM, UNKNOWN_TIME, History
from hllm.models.common.items import IdItems
from hllm.models.common.packing import Packing
from hllm.models.common.recommender import Batch, info_nce, no_negatives
from hllm.models.common.settings import Decoder
from hllm.models.hllm.features import EventFeatures
from hllm.models.hllm.fusion import EarlyFusion, LateFusion, classification
from hllm.models.hllm.model import HLLM
from hllm.models.hllm.probes import Probes
from hllm.models.hllm.users import DecoderUser
from hllm.settings import Stage
from tests.training.test_loop import assert_identical, run
from tests.training.world import labelled, prepared_of

OBJECTIVES = ("early_fusion", "late_fusion")
WIDTH, ITEMS, START = 24, 30, 1_500_000_000


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, WIDTH, generator=torch.manual_seed(seed)), dim=-1)


def user_model(objective: str, features: bool = True) -> DecoderUser:
    """As if trained: every weight is somewhere else than at the start."""
    torch.manual_seed(3)
    told = EventFeatures(32, "hour", 4, ITEMS) if features else None
    user = DecoderUser(build_decoder(Decoder(width=32, layers=2), 64), WIDTH, told, objective)
    with torch.no_grad():
        for parameter in user.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return user.eval()


def histories(lengths: list[int], seed: int = 5) -> History:
    random, packing = np.random.default_rng(seed), Packing(np.array(lengths))
    times = START + np.cumsum(random.integers(0, 10**6, packing.tokens + 1))
    return History(packing, random.integers(0, ITEMS, packing.tokens), times[:-1], times[1:])


def scores(user, events, history, candidates, items, sequence) -> torch.Tensor:
    """Candidates of whole histories."""
    last = history.packing.last_S
    return user.scores(events, history, candidates, items, sequence, last, history.next_times_T[last])


def part_of(history: History, start: int, end: int, asked: int) -> History:
    times = np.append(history.times_T[start + 1 : end], asked)
    packing = Packing(np.array([end - start]))
    return History(packing, history.items_T[start:end], history.times_T[start:end], times)


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_500_candidates_in_one_call_are_500_calls(objective: str, features: bool):
    user, history = user_model(objective, features), histories([7, 40])
    events, candidates = unit(47, 1), unit(503, 2)
    items = np.append(np.arange(502) % ITEMS, UNKNOWN_ITEM)
    sequence = np.repeat([0, 1], [3, 500])
    seen: list[int] = []
    hook = user.decoder.norm.register_forward_hook(lambda *call: seen.append(call[1][0].shape[1]))
    with torch.no_grad():
        together = scores(user, events, history, candidates, items, sequence)
        hook.remove()
        # Every event once; beside it one position for each candidate (early), or for each user (late).
        assert seen == [47 + (503 if objective == "early_fusion" else 2)]
        firsts, ends = [0, 7], [7, 47]
        for row in [0, 2, 3, 4, *range(5, 503, 83), 502]:
            start, end = firsts[sequence[row]], ends[sequence[row]]
            one = part_of(history, start, end, int(history.next_times_T[end - 1]))
            alone = scores(
                user, events[start:end], one, candidates[row : row + 1], items[row : row + 1], np.array([0])
            )
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    assert together.std() > 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_judges_each_event_as_inference_would_have(objective: str):
    user, history = user_model(objective), histories([3, 6])
    events, targets, items = unit(9, 1), unit(9, 2), np.arange(9)
    with torch.no_grad():
        outputs, logits = user.judge(events, history, targets, Probes.of_targets(history, items))
        torch.testing.assert_close(outputs, user(events, history))
        for start, end, row in ((0, 1, 0), (0, 3, 2), (3, 4, 3), (3, 7, 6), (3, 9, 8)):
            before = part_of(history, start, end, int(history.next_times_T[end - 1]))
            alone = scores(
                user, events[start:end], before, targets[row : row + 1], items[row : row + 1], np.array([0])
            )
            torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_a_candidate_is_told_as_an_event_is_by_its_id_and_the_moment_of_the_question():
    user, history = user_model("early_fusion"), histories([5])
    events, candidate, first = unit(5, 1), unit(1, 2), np.array([0])

    def score(item: int, asked: int) -> float:
        one = part_of(history, 0, 5, asked)
        return float(scores(user, events, one, candidate, np.array([item]), first).detach())

    assert score(4, START) != score(5, START)
    assert score(4, START) != score(4, START + 3600 * 24 * 40)
    assert score(ITEMS, START) == score(UNKNOWN_ITEM, START) != score(4, UNKNOWN_TIME)


def test_late_fusion_serves_candidates_it_never_met_from_one_vector():
    user, history = user_model("late_fusion"), histories([5, 5, 8])
    with torch.no_grad():
        last = history.packing.last_S
        vectors = user.user_token_vectors(unit(18, 1), history, last, history.next_times_T[last])
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
        candidates, sequence = unit(3, 4), np.arange(3)
        logits = scores(user, unit(18, 1), history, candidates, np.arange(3), sequence)
        torch.testing.assert_close(user.late_fusion(vectors, candidates), logits)
    assert (vectors - user(unit(18, 1), history)[torch.tensor([4, 9, 17])]).abs().max() > 0.01
    with pytest.raises(ValueError, match="has no \\[USER\\] vector"):
        _ = user_model("early_fusion").late_fusion


def recommender(objective: str, weight: float) -> tuple[HLLM, Batch]:
    torch.manual_seed(0)
    history = histories([2, 4])
    model = HLLM(IdItems(ITEMS, WIDTH), user_model(objective), 0.07, weight)
    targets, negatives = np.array([1, 2, 3, 4, 5, 6]), np.array([7, 8, 9, 1])
    labels = np.array([1, 0, -1, 1, 0, 1], np.int8)
    batch = Batch(history, targets, negatives, np.zeros((2, 4), bool), targets, negatives, labels)
    return model, batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_lambda_times_the_generative_one_and_the_cross_entropy_of_known_labels(objective: str):
    model, batch = recommender(objective, 0.3)
    vectors = model.items.table / model.items.table.norm(dim=1, keepdim=True)
    events, targets = vectors[batch.history.items_T], vectors[batch.targets_T]
    outputs, logits = model.user.judge(
        events, batch.history, targets, Probes.of_targets(batch.history, batch.targets_T)
    )
    generative = info_nce(
        outputs, targets, vectors[batch.negatives_N], no_negatives(batch, torch.device("cpu")), model.scale
    )
    known = torch.tensor([0, 1, 3, 4, 5])
    chances = logits.sigmoid()[known]
    liked = torch.tensor([1.0, 0, 1, 0, 1])
    by_hand = -(liked * chances.log() + (1 - liked) * (1 - chances).log()).mean()
    torch.testing.assert_close(model.loss(batch), 0.3 * generative + by_hand)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_everything_that_judges_learns(objective: str):
    model, batch = recommender(objective, 0.0)
    model.loss(batch).backward()
    for name, parameter in model.user.fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert model.items.table.grad[batch.targets_T].abs().sum() > 0
    assert model.items.table.grad[batch.history.items_T].abs().sum() > 0
    assert model.user.decoder.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("heads", [EarlyFusion(64), LateFusion(64, 64, 1.0)])
def test_candidates_have_scores_of_their_own_in_bf16_too(heads: EarlyFusion | LateFusion):
    torch.manual_seed(0)
    torch.nn.init.normal_(heads.head[-1].weight)
    vectors = torch.nn.functional.normalize(torch.randn(4000, 64), dim=-1)
    given = (vectors,) if isinstance(heads, EarlyFusion) else (vectors[:1].expand(4000, -1), vectors)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = heads(*given)
    with torch.no_grad():
        assert torch.equal(found, heads(*given))
    assert len(found.unique()) > 3900


def test_a_batch_without_any_label_has_no_classification_loss():
    logits = torch.randn(3, requires_grad=True)
    loss = classification(logits, torch.tensor([-1, -1, -1], dtype=torch.int8))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(logits.grad, torch.zeros(3))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stop_and_a_continuation_end_where_an_uninterrupted_run_does(tmp_path: Path, objective: str):
    (tmp_path / "prepared").mkdir()
    prepared = labelled(prepared_of(tmp_path / "prepared", [5, 8, 12], items=ITEMS))
    stage = Stage(history_length=6, batch_size=2, negatives=4, steps=6, lr=1e-2)
    whole, stopped, continued = (recommender(objective, 0.5)[0] for _ in range(3))
    ended = run(prepared, tmp_path / "whole", whole, stage)
    with pytest.raises(Terminated):
        run(prepared, tmp_path / "parts", stopped, stage, stop_after=3)
    assert run(prepared, tmp_path / "parts", continued, stage).last_loss == ended.last_loss
    assert_identical(whole, continued)
    assert (
        whole.user.fusion.head[2].weight != recommender(objective, 0.5)[0].user.fusion.head[2].weight
    ).all()


@pytest.mark.parametrize("objective", ["generative", *OBJECTIVES])
def test_the_user_llm_is_told_when_events_happened_and_not_when_the_next_one_will(objective: str):
    """The time of the event that is to be predicted would be a leak."""
    user, history = user_model(objective), histories([6])
    inputs = unit(6, 2)
    later = dataclasses.replace(history, next_times_T=history.next_times_T + 10**8)
    own = history.times_T.copy()
    own[3] += 10**6
    with torch.no_grad():
        before, after, moved = (
            user(inputs, seen) for seen in (history, later, dataclasses.replace(history, times_T=own))
        )
    assert torch.equal(before, after)
    torch.testing.assert_close(moved[:3], before[:3])
    assert (moved[3:] - before[3:]).abs().amax(1).min() > 1e-5
