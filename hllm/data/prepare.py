"""`hllm prepare`: valid tables -> numbered items, ordered histories, splits, every text tokenised once."""

from __future__ import annotations

from hllm.data.engine import duck
from hllm.data.histories import number_and_sort, write_events
from hllm.data.items import write_items
from hllm.data.splits import write_splits
from hllm.errors import DataError
from hllm.work.artifacts import clear
from hllm.work.step import Context


def prepare(context: Context) -> None:
    """Write the files of `hllm.data.prepared`."""
    clear(context.output)
    settings, source, output = context.settings.prepare, context.inputs["validate"], context.output
    with duck.connect(context.work, context.settings.run.threads) as db:
        counts = number_and_sort(
            db, source / "items.parquet", source / "interactions.parquet", settings.k_core
        )
        if not counts["events"]:
            raise DataError(
                "no events are left",
                where="prepare",
                remedy=f"prepare.k_core = {settings.k_core} drops every user and item."
                if settings.k_core
                else "",
            )
        write_events(db, output, counts["events"])
        held_out = write_splits(db, output, settings)
    tokenizer = next(iter(context.step.backbones), "")  # the setting that names it
    texts = write_items(
        source / "items.parquet",
        output,
        context.work,
        settings,
        context.settings.at(tokenizer) if tokenizer else "",
        held_out.item_train_events,
        context.settings.data.batch_rows,
    )
    context.rows |= {"items": counts["items"], "users": counts["users"], "events": counts["events"]}
    context.facts |= {
        **counts,
        "train_events": int(held_out.item_train_events.sum()),
        "valid_events": held_out.valid,
        "test_events": held_out.test,
        "items_without_training_events": int((held_out.item_train_events == 0).sum()),
        **texts,
    }
