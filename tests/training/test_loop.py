"""The loop: it learns, it stops when told, and a killed run ends bit for bit where an uninterrupted one
does."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hllm.data.prepared import Prepared
from hllm.errors import DataError, Terminated
from hllm.models.common.backbone import build_decoder
from hllm.models.common.recommender import Recommender
from hllm.models.common.settings import Decoder
from hllm.models.hllm.items import TextItems
from hllm.models.sasrec.user import SASRecUser
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.checkpoint import Checkpoints
from hllm.training.loop import Trained, fit, share_of_peak
from hllm.training.updates import parameter_groups
from tests.training.world import ADAPTED, FEATURES, labelled, prepared_of, tiny_hllm, tiny_model

STAGE = Stage(history_length=8, batch_size=4, negatives=10, steps=20, lr=3e-3)
KINDS: dict[str, dict[str, Any]] = {
    "adapted, told of times and IDs, judging late": {
        "objective": "late_fusion",
        "whiten": True,
        "dropout": 0.1,
        **FEATURES,
        **ADAPTED,
    },
    "over frozen items, judging early": {
        "objective": "early_fusion",
        "item_llm": {"frozen": True},
        "whiten": True,
        "dropout": 0.1,
        **FEATURES,
    },
}


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    (tmp_path / "prepared").mkdir()
    return prepared_of(tmp_path / "prepared", [12, 9, 15, 20, 11], items=30)


def run(
    prepared: Prepared,
    work: Path,
    model: Recommender,
    stage: Stage = STAGE,
    stop_after: int = 0,
    validate: Any = None,
    poison: Any = lambda step: None,
) -> Trained:
    """Train; with `stop_after`, as SIGTERM would end it during that step."""
    work.mkdir(exist_ok=True)
    stopping, batches = (
        threading.Event(),
        Batches(prepared, stage.history_length, stage.batch_size, stage.negatives, 1),
    )

    class Watched:
        windows, steps_per_epoch = batches.windows, batches.steps_per_epoch

        def __getitem__(self, step: int) -> Any:
            poison(step)
            if step + 1 == stop_after:
                stopping.set()
            return batches[step]

    watched: Any = Watched()
    return fit(
        model,
        watched,
        stage,
        seed=1,
        checkpoints=Checkpoints(work),
        stopping=stopping,
        log=lambda values, at: None,
        validate=validate,
    )


def weights(model: Recommender) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_identical(one: Recommender, other: Recommender) -> None:
    for name, value in weights(one).items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ten_steps_a_stop_and_ten_more_equal_twenty(prepared: Prepared, tmp_path: Path, accumulate: int):
    stage = STAGE.model_copy(update={"accumulate": accumulate})
    whole = tiny_model(30)
    uninterrupted = run(prepared, tmp_path / "whole", whole, stage)
    with pytest.raises(Terminated):
        run(prepared, tmp_path / "parts", tiny_model(30), stage, stop_after=10)
    second = tiny_model(30)
    continued = run(prepared, tmp_path / "parts", second, stage)
    assert_identical(whole, second)
    assert (continued.first_loss, continued.last_loss) == (uninterrupted.first_loss, uninterrupted.last_loss)


@pytest.mark.parametrize("kind", KINDS)
def test_in_parts_a_stop_changes_nothing_of_what_any_kind_of_llms_learns(
    kind: str, prepared: Prepared, tmp_path: Path
):
    data = labelled(prepared)
    stage = STAGE.model_copy(update={"steps": 6, "accumulate": 2})
    before, whole, stopped, second = (tiny_hllm(data, layers=1, **KINDS[kind]) for _ in range(4))
    uninterrupted = run(data, tmp_path / "whole", whole, stage)
    with pytest.raises(Terminated):
        run(data, tmp_path / "parts", stopped, stage, stop_after=3)
    assert run(data, tmp_path / "parts", second, stage).last_loss == uninterrupted.last_loss
    assert_identical(whole, second)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, whole.state_dict()[name]) != parameter.requires_grad, name


def test_the_best_weights_survive_a_stop(prepared: Prepared, tmp_path: Path):
    stage = STAGE.model_copy(update={"evaluate_every": 4})
    scores = {0: 0.1, 4: 0.5, 8: 0.9, 12: 0.2, 16: 0.3, 20: 0.1}

    def validator() -> Any:
        return lambda model: scores[next(steps)]

    steps = iter((0, 4, 8, 12, 16, 20))
    whole = tiny_model(30)
    assert run(prepared, tmp_path / "whole", whole, stage, validate=validator()).best_step == 8
    steps = iter((0, 4, 8, 12, 16, 20))
    with pytest.raises(Terminated):
        run(prepared, tmp_path / "parts", tiny_model(30), stage, stop_after=10, validate=validator())
    second = tiny_model(30)
    assert run(prepared, tmp_path / "parts", second, stage, validate=validator()).best_step == 8
    assert_identical(whole, second)


def test_a_stage_that_only_makes_it_worse_keeps_the_weights_it_began_with(prepared: Prepared, tmp_path: Path):
    model, before = tiny_model(30), tiny_model(30)
    steps = iter((0.9, 0.5, 0.4, 0.3, 0.2, 0.1))
    stage = STAGE.model_copy(update={"evaluate_every": 4})
    assert run(prepared, tmp_path / "work", model, stage, validate=lambda model: next(steps)).best_step == 0
    assert_identical(before, model)


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    prepared: Prepared, tmp_path: Path, capsys
):
    whole = tiny_model(30)
    run(prepared, tmp_path / "whole", whole)
    for stop in (6, 12):
        with pytest.raises(Terminated):
            run(prepared, tmp_path / "parts", tiny_model(30), stop_after=stop)
    newest = sorted((tmp_path / "parts").glob("step-*"))[-1] / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    second = tiny_model(30)
    run(prepared, tmp_path / "parts", second)
    said = capsys.readouterr()
    assert "step-000000012 is damaged" in said.err
    assert "continues from step 6 of 20" in said.out
    assert_identical(whole, second)


def test_no_checkpoint_is_a_pickle(prepared: Prepared, tmp_path: Path):
    with pytest.raises(Terminated):
        run(prepared, tmp_path / "parts", tiny_model(30), stop_after=5)
    assert {path.suffix for path in (tmp_path / "parts").rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
    }


def test_training_lowers_the_loss(prepared: Prepared, tmp_path: Path):
    trained = run(
        prepared, tmp_path / "work", tiny_model(30, dropout=0.0), STAGE.model_copy(update={"steps": 80})
    )
    assert trained.last_loss < 0.5 * trained.first_loss


def test_a_loss_that_is_not_finite_stops_the_run(prepared: Prepared, tmp_path: Path):
    model = tiny_model(30)
    model.user.input_scale.data.fill_(float("nan"))
    with pytest.raises(DataError, match="the loss is nan at step 0"):
        run(prepared, tmp_path / "work", model)
    work = tmp_path / "work"
    assert torch.isnan(load_file(work / "not_finite_weights.safetensors")["user.input_scale"])
    batch = load_file(work / "not_finite_batch.safetensors")
    assert len(batch["items"]) == len(batch["targets"]) == int(batch["lengths"].sum())
    assert len(batch["negatives"]) == STAGE.negatives


def test_what_fails_between_two_looks_is_kept_as_it_was(prepared: Prepared, tmp_path: Path):
    """The loss is looked at every ten steps; weights and batch are those of the step that failed."""
    before = tiny_model(30, dropout=0.0)
    stage = STAGE.model_copy(update={"warmup": 0.5})
    with pytest.raises(Terminated):
        run(prepared, tmp_path / "three", before, stage, stop_after=3)
    model = tiny_model(30, dropout=0.0)
    with pytest.raises(DataError, match="the loss is nan at step 3"):
        run(
            prepared,
            tmp_path / "work",
            model,
            stage,
            poison=lambda step: model.user.input_scale.data.fill_(torch.nan) if step == 3 else None,
        )
    saved = load_file(tmp_path / "work" / "not_finite_weights.safetensors")
    batch = load_file(tmp_path / "work" / "not_finite_batch.safetensors")
    expected = Batches(prepared, 8, 4, 10, 1)[3].tensors()
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    del saved["user.input_scale"]
    for name, value in saved.items():
        assert torch.equal(value, before.state_dict()[name]), name


def test_a_gradient_that_is_not_finite_is_named_with_its_own_norm(prepared: Prepared, tmp_path: Path):
    model = tiny_model(30, dropout=0.0)

    def poison(step: int) -> None:
        if step == 3:
            model.log_scale.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(DataError, match=r"the gradient norm is (inf|nan) at step 3"):
        run(prepared, tmp_path / "work", model, poison=poison)


def test_learning_rate_rises_then_falls_to_a_tenth():
    shares = [share_of_peak(step, 100, 0.1) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.1, abs=0.01)
    assert all(after <= before for before, after in pairwise(shares[10:]))


def test_weight_decay_spares_norms_biases_scalars_and_embeddings():
    model = tiny_model(30)
    groups = parameter_groups(model, Stage(weight_decay=0.01))
    (decayed,) = (group for group in groups if group["weight_decay"])
    (spared,) = (group for group in groups if not group["weight_decay"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].rpartition(".")[2] for parameter in decayed["params"]} == {"weight"}
    assert {"items.table", "user.positions", "user.input_scale", "log_scale"} <= {
        names[id(parameter)] for parameter in spared["params"]
    }
    assert all(parameter.ndim == 2 for parameter in decayed["params"])


def test_item_side_and_words_have_learning_rates_of_their_own():
    model = Recommender(
        TextItems(build_decoder(Decoder(width=16, heads=2, layers=1), 64)),
        SASRecUser(16, 1, 2, 0.0, 20),
        0.07,
    )
    peaks = {}
    for group in parameter_groups(model, Stage(lr=1e-3, item_lr=1e-4, words_lr=1e-2)):
        peaks |= {id(parameter): group["peak_lr"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        words, item = name == "items.words", name.startswith("items.")
        assert peaks[id(parameter)] == (1e-2 if words else 1e-4 if item else 1e-3), name
    same = parameter_groups(model, Stage(lr=1e-3))
    assert {group["peak_lr"] for group in same} == {1e-3}
