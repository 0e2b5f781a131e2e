"""Catalogue encoding: our Item LLM beside `sentence-transformers`, the same weights on the same texts.

    python benchmarks/encode.py

Both take texts and give unit vectors: the last hidden state of an [ITEM] token after the text, fp32, no
gradient. The peer is a SentenceTransformer of a saved Llama folder (SmolLM2-135M's shape, cut to a few
layers) whose tokenizer knows [ITEM], with last-token pooling and normalisation; it sorts by length, as it
always does, and the better of its two batch sizes counts. Ours includes tokenising. Two catalogues: film
titles with year and genres, and texts as long as product descriptions. Vectors are compared before the
clock starts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import BACKBONE, film_texts, long_texts, smollm2, write_tokens
from measure import Figures, arguments, interleaved, machine, memory_apart, print_memory_of, print_table
from tokenizers.processors import TemplateProcessing

from hllm.data.prepared import ARRAYS, Prepared
from hllm.embedding.items import batches_by_tokens
from hllm.models.common.backbone import PretrainedTokenizer, find
from hllm.models.hllm.items import TextItems

TOKENS_PER_BATCH = 8_192
PEERS = ("sentence-transformers, batches of 32", "sentence-transformers, batches of 128")
WAYS = ("ours", *PEERS)
WANTED = 1.0


@dataclass(frozen=True)
class Size:
    films: int
    descriptions: int
    films_in_description: int
    layers: int
    repeats: int


FULL = Size(films=800, descriptions=200, films_in_description=12, layers=3, repeats=3)
QUICK = Size(films=40, descriptions=10, films_in_description=4, layers=1, repeats=1)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    quiet()
    if args.only:
        way, _, catalogue = args.only.rpartition("/")
        encode = sides(args.folder, catalogue, texts_of(size)[catalogue], [way])[way]
        print_memory_of(lambda: len(encode()))
        return
    print(machine(args.threads))
    figures = Figures("encoding")
    with tempfile.TemporaryDirectory() as name:
        save_peer(Path(name), size.layers)
        for catalogue, texts in texts_of(size).items():
            (Path(name) / catalogue).mkdir()
            compare(Path(name), catalogue, texts, size, args, figures)
    figures.finish(args.figures)


def compare(
    folder: Path, catalogue: str, texts: list[str], size: Size, args: argparse.Namespace, figures: Figures
) -> None:
    ways = sides(folder, catalogue, texts, list(WAYS))
    ours, peers = ways["ours"](), {way: encode() for way, encode in ways.items() if way != "ours"}
    apart = max(float(np.abs(ours - vectors).max()) for vectors in peers.values())
    if apart > 1e-4:
        sys.exit(f"{catalogue}: the vectors differ by up to {apart}")
    lengths = np.diff(np.load(folder / catalogue / "token_offsets.npy")) + 1
    print(
        f"\n{catalogue}: {len(texts):,} texts of {lengths.mean():.0f} tokens, at most {lengths.max()}; "
        f"vectors agree within {apart:.0e}"
    )
    times = interleaved(ways, size.repeats)
    best = min(PEERS, key=lambda way: times[way].median)
    memory = {way: memory_apart(__file__, f"{way}/{catalogue}", folder, args)[0] for way in ("ours", best)}
    peaks = {way: str(memory.get(way, "not measured")) for way in ways}
    print_table(
        [(way, f"{len(texts) / times[way].median:,.0f}", str(times[way]), peaks[way]) for way in ways],
        ("encoder", "items/s", "median (range)", "peak memory"),
    )
    for way in ways:
        figures.add(
            f"{catalogue}, {way}", f"{len(texts) / times[way].median:,.0f} items/s; peak {peaks[way]}"
        )
    ratio = times[best].median / times["ours"].median
    what = f"{catalogue}: our encoding against sentence-transformers"
    figures.claim(what, f"{ratio:.2f} times as fast", "at least equal", ratio >= WANTED)


def quiet() -> None:
    """No progress bars of the libraries between the figures."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def texts_of(size: Size) -> dict[str, list[str]]:
    return {
        "titles": film_texts(size.films),
        "descriptions": long_texts(size.descriptions, size.films_in_description),
    }


def save_peer(folder: Path, layers: int) -> None:
    """A Llama folder as anybody would have it on disk; our side reads the same files."""
    torch.manual_seed(0)
    tokenizer = PretrainedTokenizer(find(BACKBONE))._tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ITEM]"]})
    item = tokenizer.convert_tokens_to_ids("[ITEM]")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [ITEM]", special_tokens=[("[ITEM]", item)]
    )
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    tokenizer.chat_template = None  # with it, sentence-transformers would encode every text as a conversation
    decoder = smollm2(layers)
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    decoder.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")


def sides(
    folder: Path, catalogue: str, texts: list[str], wanted: list[str]
) -> dict[str, Callable[[], np.ndarray]]:
    """Encoders of the whole catalogue, their models loaded."""
    found: dict[str, Callable[[], np.ndarray]] = {}
    if "ours" in wanted:
        items, tokenizer = our_items(folder)
        found["ours"] = lambda: encode_ours(items, tokenizer, folder / catalogue, texts)
    peer = peer_model(folder) if set(wanted) - {"ours"} else None
    for way in set(wanted) - {"ours"}:
        found[way] = partial(
            peer.encode,
            texts,
            batch_size=int(way.split()[-1]),
            convert_to_numpy=True,
            show_progress_bar=False,
        )
    return {way: found[way] for way in wanted}


def our_items(folder: Path) -> tuple[TextItems, PretrainedTokenizer]:
    from safetensors.torch import load_file

    from hllm.models.common.backbone import decoder_from_config, shape_of

    tokenizer = PretrainedTokenizer(find(str(folder / "llama")))
    weights = load_file(folder / "llama" / "model.safetensors")
    decoder = decoder_from_config(shape_of(find(str(folder / "llama"))).to_dict())
    decoder.load_state_dict(weights)
    items = TextItems(decoder).eval()
    with torch.no_grad():
        items.item_token.copy_(items.words[tokenizer._tokenizer.convert_tokens_to_ids("[ITEM]")])
    return items, tokenizer


def encode_ours(
    items: TextItems, tokenizer: PretrainedTokenizer, folder: Path, texts: list[str]
) -> np.ndarray:
    ids = tokenizer.encode_batch(texts)
    write_tokens(folder, ids)
    nobody: dict[str, Any] = dict.fromkeys(ARRAYS, np.empty(0, np.int64))
    catalogue = {name: np.load(folder / f"{name}.npy") for name in ("token_ids", "token_offsets")}
    prepared = Prepared(folder, **(nobody | catalogue))
    items.attach(prepared.token_ids, prepared.token_offsets)
    vectors = np.empty((len(texts), items.width), np.float32)
    with torch.inference_mode():
        for chosen in batches_by_tokens(prepared, 0, len(texts), TOKENS_PER_BATCH, items):
            vectors[chosen] = items(chosen).numpy()
    return vectors


def peer_model(folder: Path):  # type: ignore[no-untyped-def]
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    llama = Transformer(str(folder / "llama"), max_seq_length=2048, model_kwargs={"dtype": torch.float32})
    return SentenceTransformer(
        modules=[llama, Pooling(llama.get_embedding_dimension(), "lasttoken"), Normalize()], device="cpu"
    )


if __name__ == "__main__":
    main()
