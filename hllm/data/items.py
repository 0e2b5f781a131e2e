"""Item texts: each one joined from its fields and tokenised, once for all steps that follow.

The fields, their order and how many tokens of them are read: HLLM, section 3.2 and table 9.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from hllm.data.prepared import array_file, write_arrays
from hllm.data.schema import text_columns
from hllm.data.tables import open_parquet
from hllm.errors import ConfigError
from hllm.settings import Prepare

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
OURS = ("item_index", "item_id", "text", "title", "train_events")


def write_items(
    source: Path,
    output: Path,
    scratch: Path,
    settings: Prepare,
    backbone: str,
    train_events: npt.NDArray[np.int64],
    batch_rows: int,
) -> dict[str, int]:
    """items.parquet, token_ids and token_offsets; a batch of items in memory at a time."""
    from hllm.models.common.backbone import tokenizer_for

    tokenizer = tokenizer_for(backbone)
    encode, (before, after) = tokenizer.encode_batch, tokenizer.frame
    room = settings.max_tokens - len(before) - len(after)
    _require_room_for_text(encode, settings, room)
    lengths: list[int] = []
    truncated = without_text = 0
    with open_parquet(source) as file, (scratch / "tokens.bin").open("wb") as tokens:
        fields = _chosen_fields(text_columns(file.schema_arrow.names), settings)
        others = [name for name in file.schema_arrow.names if name not in OURS]
        schema = pa.schema(
            [
                ("item_index", pa.int32()),
                ("item_id", pa.string()),
                ("text", pa.string()),
                ("title", pa.string()),
                ("train_events", pa.int64()),
                *(file.schema_arrow.field(name) for name in others),
            ]
        )
        with pa.parquet.ParquetWriter(output / "items.parquet", schema, compression="zstd") as writer:
            for batch in file.iter_batches(batch_size=min(batch_rows, 4096)):
                first = len(lengths)
                values = list(_cleaned(batch, fields))
                texts = [join(item, settings) for item in values]
                without_text += texts.count("")
                for ids in encode([settings.prompt + text for text in texts]):
                    truncated += len(ids) > room
                    kept = [*before, *ids[:room], *after]
                    lengths.append(len(kept))
                    tokens.write(np.asarray(kept, np.int32).tobytes())
                columns: dict[str, Any] = {
                    "item_index": np.arange(first, len(lengths), dtype=np.int32),
                    "item_id": batch.column("item_id"),
                    "text": pa.array(texts, pa.string()),
                    "title": pa.array(
                        [next(filter(None, item.values()), "") for item in values], pa.string()
                    ),
                    "train_events": train_events[first : len(lengths)],
                }
                columns |= {name: batch.column(name) for name in others}
                writer.write_batch(
                    pa.record_batch(
                        [pa.array(columns[name], schema.field(name).type) for name in schema.names],
                        schema=schema,
                    )
                )
    _write_tokens(scratch / "tokens.bin", output, lengths)
    return {
        "tokens": sum(lengths),
        "longest_item_tokens": max(lengths),
        "truncated_items": truncated,
        "items_without_text": without_text,
    }


def item_texts(source: Path, settings: Prepare) -> Iterator[pa.RecordBatch]:
    """(item_id, text) of a catalogue's items, the texts exactly as `write_items` joins them."""
    with open_parquet(source) as file:
        fields = _chosen_fields(text_columns(file.schema_arrow.names), settings)
        for batch in file.iter_batches(batch_size=4096):
            texts = [join(item, settings) for item in _cleaned(batch, fields)]
            columns = [batch.column("item_id"), pa.array(texts, pa.string())]
            yield pa.record_batch(columns, ["item_id", "text"])


def join(fields: Mapping[str, str], settings: Prepare) -> str:
    """The fields that hold something, each in the template, with the separator between them."""
    written = (
        settings.field_template.replace("{name}", name).replace("{value}", value)
        for name, value in fields.items()
        if value
    )
    return settings.field_separator.join(written)


def clean(text: str | None) -> str:
    """One line of visible text: control characters and runs of white space become single spaces."""
    return " ".join(CONTROL.sub(" ", text or "").split())


def _chosen_fields(there: list[str], settings: Prepare) -> list[str]:
    unknown = [name for name in settings.fields if name not in there]
    if unknown:
        raise ConfigError(
            "the catalogue has no such text field",
            where="prepare.fields",
            examples=unknown,
            remedy=f"Its text fields are {', '.join(there)}.",
        )
    return list(settings.fields) or there


def _cleaned(batch: pa.RecordBatch, fields: list[str]) -> Iterator[dict[str, str]]:
    columns = [batch.column(name).to_pylist() for name in fields]
    for values in zip(*columns, strict=True):
        yield {name: clean(value) for name, value in zip(fields, values, strict=True)}


def _require_room_for_text(encode: Any, settings: Prepare, room: int) -> None:
    """A prompt that fills every token would give all items the same vector."""
    (prompt,) = encode([settings.prompt]) if settings.prompt else ([],)
    if len(prompt) >= room:
        raise ConfigError(
            f"prepare.prompt takes {len(prompt)} of {room} tokens: no item text is left",
            remedy="Shorten prepare.prompt or raise prepare.max_tokens.",
        )


def _write_tokens(raw: Path, output: Path, lengths: list[int]) -> None:
    write_arrays(output, token_offsets=np.concatenate([[0], np.cumsum(lengths)]))
    with raw.open("rb") as tokens, array_file(output, "token_ids", sum(lengths)) as ids:
        shutil.copyfileobj(tokens, ids)
