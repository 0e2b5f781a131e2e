"""The item side: one vector per text, whoever else is in the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.models.common.backbone import build_decoder
from hllm.models.common.items import CachedItems, IdItems
from hllm.models.common.settings import Decoder
from hllm.models.hllm.items import TextItems

TEXTS = [
    b"Toy Story",
    b"GoldenEye",
    b"a",
    b"Toy Story 2: the longest title of all",
    "日本 🎬".encode(),
    b"Heat",
    b"Heat",
]
OFFSETS = np.concatenate([[0], np.cumsum([len(text) for text in TEXTS])]).astype(np.int64)
TOKENS = np.frombuffer(b"".join(TEXTS), np.uint8).astype(np.int32)


def text_items(trim: bool = False, vector: str = "item_token") -> TextItems:
    torch.manual_seed(1)
    items = TextItems(build_decoder(Decoder(width=32, layers=2, heads=2), 256), vector=vector)
    if vector == "item_token":
        torch.nn.init.normal_(items.item_token)
    items.attach(TOKENS, OFFSETS, trim=trim)
    return items.eval()


ITEMS = {vector: text_items(vector=vector) for vector in ("item_token", "mean")}


@pytest.mark.parametrize("vector", ["item_token", "mean"])
@settings(max_examples=25, deadline=None)
@given(chosen=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=7, unique=True))
def test_a_vector_is_the_same_alone_and_in_any_company(vector: str, chosen: list[int]):
    with torch.no_grad():
        together = ITEMS[vector](np.array(chosen))
        alone = torch.cat([ITEMS[vector](np.array([item])) for item in chosen])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_the_mean_is_what_transformers_computes_text_by_text():
    items = text_items(vector="mean")
    config = copy.deepcopy(items.decoder.config)
    config._attn_implementation = "eager"
    plain = type(items.decoder)(config).eval()
    plain.load_state_dict({**items.decoder.state_dict(), "embed_tokens.weight": items.words.detach()})
    with torch.no_grad():
        expected = [
            plain(input_ids=torch.tensor([list(text)])).last_hidden_state[0].mean(0) for text in TEXTS
        ]
        torch.testing.assert_close(
            items.hidden(np.arange(len(TEXTS))), torch.stack(expected), atol=1e-5, rtol=1e-4
        )


def test_vectors_have_unit_length_and_equal_texts_equal_vectors():
    with torch.no_grad():
        vectors = ITEMS["item_token"](np.arange(len(TEXTS)))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(vectors[5], vectors[6])
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3


def test_trimming_the_vocabulary_changes_neither_vectors_nor_what_is_saved():
    whole, trimmed = text_items(), text_items(trim=True)
    assert len(trimmed.words) == len(np.unique(TOKENS)) < 256
    with torch.no_grad():
        torch.testing.assert_close(trimmed(np.arange(7)), whole(np.arange(7)))
        trimmed.words += 1.0
    saved, untouched = trimmed.full_state()["words"], whole.words.detach()
    used = np.unique(TOKENS)
    unused = np.setdiff1d(np.arange(256), used)
    assert saved.shape == (256, 32)
    torch.testing.assert_close(saved[used], untouched[used] + 1.0)
    torch.testing.assert_close(saved[unused], untouched[unused])


def test_the_item_token_and_the_words_learn():
    items = text_items(trim=True)
    torch.nn.init.zeros_(items.item_token)
    items(np.arange(7))[:, 0].sum().backward()
    assert items.item_token.grad is not None
    assert items.item_token.grad.abs().sum() > 0
    assert items.words.grad is not None
    assert items.words.grad.abs().sum() > 0


def test_whitened_vectors_are_whole_numbers_of_fp32_where_the_tower_is_not():
    torch.manual_seed(1)
    items = TextItems(build_decoder(Decoder(width=32, layers=2, heads=2), 256), whiten=True, vector="mean")
    items.attach(TOKENS, OFFSETS)
    items.start_white(np.arange(len(TEXTS)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = items(np.arange(len(TEXTS)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6, rtol=0)


def test_ids_and_cache_look_up_rows():
    table = IdItems(5, 8)
    torch.testing.assert_close(table(np.array([3, 1]))[0], table(np.array([3]))[0])
    cached = CachedItems(np.eye(4, dtype=np.float32))
    assert cached(np.array([2, 0])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert not list(cached.parameters())


@pytest.mark.parametrize("length", [1, 2, 24])
def test_texts_of_the_shortest_and_longest_length(length: int):
    items = text_items()
    items.attach(np.arange(length, dtype=np.int32), np.array([0, length]))
    with torch.no_grad():
        assert torch.isfinite(items(np.array([0]))).all()


def test_a_frozen_tower_reads_every_text_once_and_its_whitening_learns(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    items = TextItems(build_decoder(Decoder(width=32, layers=1, heads=2), 256), whiten=True, vector="mean")
    items.attach(TOKENS, OFFSETS, trim=True)
    everything = np.arange(len(TEXTS))
    items.start_white(everything)
    expected = items(everything).detach()
    items.freeze()
    read: list[int] = []
    before = items._read
    monkeypatch.setattr(items, "_read", lambda items_K: read.extend(items_K.tolist()) or before(items_K))
    for chosen in ([2, 0], [0, 1, 2, 3], everything):
        torch.testing.assert_close(items(np.array(chosen)), expected[chosen])
    assert sorted(read) == everything.tolist()
    items(everything).sum().backward()
    learning = {name for name, parameter in items.named_parameters() if parameter.grad is not None}
    assert learning == {"centre", "projection"}


def test_what_a_frozen_tower_remembers_does_not_depend_on_the_order_in_which_it_was_asked(
    monkeypatch: pytest.MonkeyPatch,
):
    """Otherwise a run that was killed and continued would differ in the last bits from one that was not."""
    monkeypatch.setattr("hllm.models.hllm.items.READ_TOGETHER", 2)
    found = []
    for order in ([[5, 1], [0, 2, 3, 4, 6]], [[6], [4, 3], [0, 1, 2, 5]]):
        items = text_items(vector="mean")
        items.freeze()
        for chosen in order:
            items(np.array(chosen))
        found.append(items.hidden(np.arange(len(TEXTS))))
    assert torch.equal(*found)
