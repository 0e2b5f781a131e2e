"""The item cache: every item once, in its own row, whatever was killed on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm.data.prepared import Prepared
from hllm.embedding.items import ItemVectors, batches_by_tokens, embed_items
from hllm.errors import DataError
from hllm.models.hllm.items import TextItems
from hllm.models.load import load_item_model
from hllm.pipeline import steps
from hllm.work.artifacts import Store
from hllm.work.step import Context
from tests.conftest import Trained


def context(trained: Trained, output: Path, family: str = "hllm") -> Context:
    step = steps(trained.settings)[f"embed-{family}-1"]
    inputs = {need: trained[need] for need in step.needs}
    output.mkdir(exist_ok=True)
    return Context(trained.settings, step, "key", inputs, output, Store(str(output)))


@pytest.fixture
def half_done(trained: Trained, tmp_path: Path) -> Path:
    """A cache that a kill left without its second shard, and with half of a file."""
    folder = tmp_path / "half"
    shutil.copytree(trained["embed-hllm-1"], folder)
    (folder / "manifest.json").unlink()
    (folder / "vectors-00001.npy").unlink()
    (folder / ".vectors-00001.npy").write_bytes(b"half of")
    return folder


def test_each_row_is_the_vector_of_that_item_alone(trained: Trained):
    prepared = Prepared.open(trained["prepare"])
    matrix = ItemVectors.open(trained["embed-hllm-1"]).matrix()
    model = load_item_model(trained["train-hllm-1"], prepared)
    with torch.no_grad():
        alone = np.concatenate([model(np.array([item])).numpy() for item in range(prepared.items)])
    np.testing.assert_allclose(matrix, alone, atol=1e-5)
    assert np.abs(alone - np.roll(alone, 1, axis=0)).max(1).min() > 1e-3  # a shift by one row could not pass


def test_shards_follow_one_another_without_gap_or_overlap(trained: Trained):
    shards = sorted(trained["embed-hllm-1"].glob("vectors-*.npy"))
    vectors = ItemVectors.open(trained["embed-hllm-1"])
    assert [len(np.load(path)) for path in shards] == [25, 25, 10]
    assert (len(vectors), vectors.width, vectors.matrix().shape) == (60, 32, (60, 32))
    np.testing.assert_allclose(np.linalg.norm(vectors.matrix(), axis=1), 1, atol=1e-5)


def test_a_killed_encoding_encodes_only_what_is_missing(
    trained: Trained, half_done: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[int] = []
    forward = TextItems.forward

    def counting(self: TextItems, items: np.ndarray) -> torch.Tensor:
        encoded.extend(items.tolist())
        return forward(self, items)

    monkeypatch.setattr(TextItems, "forward", counting)
    embed_items(context(trained, half_done))
    assert sorted(encoded) == list(range(25, 50))
    for path in trained["embed-hllm-1"].glob("vectors-*.npy"):
        assert (half_done / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("spoilt", [0.0, np.nan, np.inf])
def test_a_vector_that_is_zero_or_not_finite_never_leaves_the_step(
    trained: Trained, half_done: Path, monkeypatch: pytest.MonkeyPatch, spoilt: float
):
    forward = TextItems.forward

    def spoiling(self: TextItems, items: np.ndarray) -> torch.Tensor:
        vectors = forward(self, items)
        vectors[torch.from_numpy(items == 31)] = spoilt
        return vectors

    monkeypatch.setattr(TextItems, "forward", spoiling)
    with pytest.raises(DataError) as error:
        embed_items(context(trained, half_done))
    assert error.value.first_line == "embed: item vectors are not of unit length (1 of 25) (e.g. 31)"
    assert not (half_done / "vectors-00001.npy").exists()


def test_an_id_table_is_written_as_it_was_trained(trained: Trained):
    prepared = Prepared.open(trained["prepare"])
    model = load_item_model(trained["train-sasrec-1"], prepared)
    with torch.no_grad():
        expected = model(np.arange(prepared.items)).numpy()
    np.testing.assert_allclose(ItemVectors.open(trained["embed-sasrec-1"]).matrix(), expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 40, 1_000_000])
def test_batches_hold_every_item_once_and_about_as_many_tokens_as_asked(trained: Trained, tokens: int):
    prepared = Prepared.open(trained["prepare"])
    model = load_item_model(trained["train-hllm-1"], prepared)
    batches = batches_by_tokens(prepared, 7, 31, tokens, model)
    assert sorted(np.concatenate(batches).tolist()) == list(range(7, 31))
    lengths = np.diff(prepared.token_offsets) + 1
    assert all(len(batch) for batch in batches)
    assert all(lengths[batch].sum() <= tokens + lengths.max() for batch in batches)


def test_a_folder_without_vectors_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="there are no item vectors here"):
        ItemVectors.open(tmp_path)
