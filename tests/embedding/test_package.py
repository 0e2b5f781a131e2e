"""The deployable model: ids in, recommendations out, and every id has its own vector."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from hllm.data.prepared import Prepared
from hllm.embedding.items import ItemVectors
from hllm.embedding.package import Package, write_package
from hllm.embedding.users import held_out_user_vectors
from hllm.models.common.history import UNKNOWN_TIME
from hllm.models.load import load_user_model
from hllm.pipeline import keys
from hllm.work.artifacts import Store
from tests.conftest import Trained
from tests.world import TinySource, run_steps, tiny_settings


@pytest.fixture(scope="module")
def package(trained: Trained) -> Package:
    return Package.open(trained["embed-hllm-3"] / "package")


@pytest.fixture(scope="module")
def prepared(trained: Trained) -> Prepared:
    return Prepared.open(trained["prepare"])


def histories(prepared: Prepared, package: Package) -> list[list[str]]:
    offsets = prepared.user_offsets
    return [
        [package.item_ids[item] for item in prepared.event_items[offsets[user] : offsets[user + 1]]]
        for user in range(prepared.users)
    ]


def test_every_id_has_the_vector_and_the_title_that_the_item_cache_and_the_catalogue_hold(
    trained: Trained, package: Package, prepared: Prepared
):
    cached = ItemVectors.open(trained["embed-hllm-1"]).matrix()
    table = prepared.item_table(["item_id", "title"]).to_pydict()
    row_of = {item: row for row, item in enumerate(table["item_id"])}
    assert sorted(package.item_ids) == sorted(row_of)
    for item, title, vector in zip(package.item_ids, package.titles, package.item_vectors, strict=True):
        np.testing.assert_array_equal(vector, cached[row_of[item]])
        assert title == table["title"][row_of[item]]


def test_a_package_says_what_it_is_and_needs_no_item_model(package: Package):
    assert (package.family, package.width) == ("hllm", 32)
    assert {path.name for path in package.folder.iterdir()} == {
        "model.json",
        "user.safetensors",
        "items.safetensors",
        "items.parquet",
    }


def test_user_vectors_are_those_of_the_trained_model(trained: Trained, package: Package, prepared: Prepared):
    users = np.arange(prepared.users)
    expected = held_out_user_vectors(
        load_user_model(trained["train-hllm-2"]),
        ItemVectors.open(trained["embed-hllm-1"]).matrix(),
        prepared,
        users,
        np.asarray(prepared.user_offsets)[users + 1],
        np.full(len(users), UNKNOWN_TIME),
        trained.settings.embed.max_history,
        7,
    )
    np.testing.assert_allclose(package.user_vectors(histories(prepared, package)), expected, atol=1e-5)


def test_a_package_reads_as_much_history_as_it_was_told_to(package: Package):
    long = (package.item_ids * 2)[:40]
    np.testing.assert_allclose(package.user_vectors([long]), package.user_vectors([long[-12:]]), atol=1e-6)
    assert np.abs(package.user_vectors([long]) - package.user_vectors([long[-11:]])).max() > 1e-6


def test_unknown_items_are_skipped_and_a_stranger_gets_zeros(package: Package):
    known = package.item_ids[:3]
    vectors = package.user_vectors([known, ["gone", known[0], "new", known[1], known[2]], ["gone"], []])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert not vectors[2:].any()
    assert package.user_vectors([]).shape == (0, 32)
    assert package.user_vectors([[], ["gone"]]).shape == (2, 32)
    assert package.recommend([["gone"], []], k=3) == [[], []]


def test_recommendations_are_the_nearest_items_best_first(package: Package):
    history = package.item_ids[10:14]
    (found,) = package.recommend([history], k=5, filter_history=False)
    scores = package.item_vectors @ package.user_vectors([history])[0]
    best = np.argsort(-scores, kind="stable")[:5]
    assert [item for item, _ in found] == [package.item_ids[row] for row in best]
    assert [score for _, score in found] == pytest.approx(scores[best].tolist(), abs=1e-6)


def test_what_the_user_had_is_left_out_on_request(package: Package):
    history = package.item_ids[:20]
    (filtered,) = package.recommend([history], k=1000)
    (whole,) = package.recommend([history], k=1000, filter_history=False)
    assert len(whole) == len(package.item_ids)
    assert {item for item, _ in filtered} == set(package.item_ids) - set(history)
    assert [item for item, _ in filtered] == [item for item, _ in whole if item not in set(history)]


def test_who_is_asked_about_together_changes_nothing(package: Package, prepared: Prepared):
    everyone = histories(prepared, package)
    together = package.recommend(everyone, k=5)
    for user in (0, 1, 7, 20):
        (alone,) = package.recommend([everyone[user]], k=5)
        assert [item for item, _ in alone] == [item for item, _ in together[user]]


def test_integer_ids_find_the_items_of_the_same_name(tmp_path: Path, package: Package):
    shutil.copytree(package.folder, tmp_path / "package")
    table = parquet.read_table(package.folder / "items.parquet")
    numbers = [str(row) for row in range(len(table))]
    renamed = table.set_column(0, "item_id", [numbers])
    parquet.write_table(renamed, tmp_path / "package" / "items.parquet")
    numbered = Package.open(str(tmp_path / "package"))
    as_numbers = numbered.user_vectors([[3, 5]])  # type: ignore[list-item]
    np.testing.assert_array_equal(as_numbers, numbered.user_vectors([["3", "5"]]))
    assert as_numbers.any()


def test_a_package_is_replaced_whole(tmp_path: Path, trained: Trained, package: Package):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "left-over.safetensors").write_text("of an earlier attempt")
    titles = parquet.read_table(package.folder / "items.parquet")
    write_package(folder, trained["train-hllm-2"], package.item_vectors, titles, 12)
    assert not (folder / "left-over.safetensors").exists()
    np.testing.assert_array_equal(Package.open(folder).item_vectors, package.item_vectors)


def test_a_model_that_reads_times_is_given_them(tmp_path: Path, tiny_source: TinySource):
    settings = tiny_settings(
        tmp_path, tiny_source, **{"model.family": "hstu", "model.baselines": [], "hstu.stage1.steps": 2}
    )
    steps = ["ingest", "validate", "prepare", "train-hstu-1", "embed-hstu-1", "embed-hstu-3"]
    folder = run_steps(settings, *steps)
    package, store = Package.open(folder / "package"), Store(settings.run.root)
    prepared = Prepared.open(store.fetch("prepare", keys(settings)["prepare"]))
    offsets, now = prepared.user_offsets, int(prepared.event_times.max())
    spans = [slice(start, end) for start, end in itertools.pairwise(offsets)]
    ids = [[package.item_ids[item] for item in prepared.event_items[span]] for span in spans]
    times = [prepared.event_times[span].tolist() for span in spans]
    found = package.user_vectors(ids, times, [now] * len(ids))
    exported = np.concatenate(
        [
            np.stack(parquet.read_table(path)["vector"].to_numpy())
            for path in sorted(folder.glob("users-*.parquet"))
        ]
    )
    np.testing.assert_allclose(found, exported, atol=1e-5)
    assert np.abs(found - package.user_vectors(ids)).max() > 1e-6
    strangers = [["gone", *history] for history in ids]
    with_strangers = package.user_vectors(strangers, [[0, *when] for when in times], [now] * len(ids))
    np.testing.assert_allclose(with_strangers, found, atol=1e-6)
