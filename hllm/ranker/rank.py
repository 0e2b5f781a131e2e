"""`hllm rank`: what the vectors are worth to a ranking model, trained and served through Feast.

Files of a `rank` output:
    ranking.json         figures of every variant and gains, overall and by segment
    ranking.md           the same as tables
    impressions.parquet  the labelled events: user_id, item_id, event_timestamp, label, part
    scores.parquet       the test impressions with each variant's score (mean over the seeds)
    ranker/              the last variant's first ranker: weights, and how features become numbers
    feast/               the store that it reads: feature_store.yaml, service `ranking`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.data.prepared import Prepared
from hllm.embedding.items import ItemVectors
from hllm.errors import DataError
from hllm.evaluation.ranker import measure, tables
from hllm.models.family import TrainedModel
from hllm.models.load import load_user_model
from hllm.pipeline import candidate
from hllm.ranker.encoding import Encoding
from hllm.ranker.features import Features, read_offline, read_online
from hllm.ranker.fit import fit
from hllm.ranker.impressions import PARTS, Impressions, Periods, known_events
from hllm.ranker.network import VARIANTS, Inputs, Trained, probabilities, sizes
from hllm.ranker.store import Vectors, own_store, write_history
from hllm.settings import Settings
from hllm.work.artifacts import clear, write_atomically
from hllm.work.progress import Progress
from hllm.work.ranks import device
from hllm.work.step import Context

if TYPE_CHECKING:
    from feast import FeatureStore

SERVED_PAIRS = 200
"""Pairs that are read online and offline and must be scored alike."""


def rank(context: Context) -> None:
    """Step: writes the files above."""
    settings, periods = context.settings, Periods.of(context.settings)
    prepared = Prepared.open(context.inputs["prepare"])
    impressions = Impressions.of(prepared, periods)
    vectors = frozen_vectors(context)
    clear(context.output / "feast")
    store, rows = write_history(
        own_store(settings, context.output / "feast"), prepared, vectors, periods.since
    )
    users, items = named(prepared)
    features = read_offline(
        store,
        users[impressions.users_R],
        items[impressions.items_R],
        impressions.times_R,
        vectors.items_ID.shape[1],
    )
    scores, epochs, trained = train_variants(settings, features, impressions)
    test_R = impressions.parts_R == PARTS.index("test")
    known_U, known_I = known_events(prepared, periods.test_from)
    of_users, of_items = impressions.users_R[test_R], impressions.items_R[test_R]
    results = about(settings, impressions, features, epochs) | measure(
        settings,
        impressions.labels_R[test_R],
        of_users,
        known_U[of_users],
        known_I[of_items],
        features.affinity_R[test_R],
        scores,
    )
    served = check_serving(settings, store, trained, prepared, impressions)
    write_atomically(context.output / "ranking.json", json.dumps(results, indent=1).encode())
    write_atomically(context.output / "ranking.md", (tables(results) + "\n").encode())
    _write_impressions(context.output / "impressions.parquet", features, impressions)
    _write_scores(
        context.output / "scores.parquet", features.take(test_R), impressions.labels_R[test_R], scores
    )
    trained.save(context.output / "ranker", settings.ranking)
    context.rows = {f"{part}_impressions": results["rows"][part] for part in PARTS} | rows
    overall = {variant: model["parts"]["overall"] for variant, model in results["models"].items()}
    context.facts = {
        **{f"{variant}_auc": round(figures["auc"]["value"], 6) for variant, figures in overall.items()},
        "pairs_served_as_trained": served,
    }


def frozen_vectors(context: Context) -> Vectors:
    settings, main = context.settings, candidate(context.settings)
    return Vectors(
        load_user_model(context.inputs[main.train_step]).to(device()),
        np.asarray(ItemVectors.open(context.inputs[TrainedModel(main.family, 1).embed_step]).matrix()),
        settings.embed.max_history,
        settings.embed.users_per_batch,
    )


def named(prepared: Prepared) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    """Ids of every user (U,) and of every item (I,)."""
    return (
        np.array(prepared.user_table(["user_id"])["user_id"].to_pylist(), object),
        np.array(prepared.item_table(["item_id"])["item_id"].to_pylist(), object),
    )


def train_variants(
    settings: Settings, features: Features, impressions: Impressions
) -> tuple[dict[str, list[npt.NDArray[np.float64]]], dict[str, list[int]], Trained]:
    """Every variant with every seed: scores of the test rows, best epochs, and the last variant's first
    ranker."""
    ranking, labels_R = settings.ranking, impressions.labels_R
    rows = {part: np.flatnonzero(impressions.parts_R == number) for number, part in enumerate(PARTS)}
    encoding = Encoding.fitted(features.take(rows["train"]), labels_R[rows["train"]])
    inputs = {}
    for part, chosen in rows.items():
        own = features.take(chosen)
        inputs[part] = Inputs.of(own, encoding(own))
    width = features.users_RD.shape[1]
    scores: dict[str, list[npt.NDArray[np.float64]]] = {variant: [] for variant in VARIANTS}
    epochs: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    kept: Trained | None = None
    with Progress("train rankers", len(VARIANTS) * ranking.seeds, "ranker") as progress:
        for variant in VARIANTS:
            for number in range(ranking.seeds):
                model, epoch = fit(
                    variant,
                    sizes(encoding, width),
                    (inputs["train"], labels_R[rows["train"]]),
                    (inputs["valid"], labels_R[rows["valid"]]),
                    ranking,
                    settings.run.seed + number,
                )
                scores[variant].append(probabilities(model, inputs["test"]))
                epochs[variant].append(epoch)
                if variant == VARIANTS[-1] and kept is None:
                    kept = Trained(model, encoding, width)
                progress.advance(1)
    assert kept is not None  # noqa: S101 - there is at least one seed
    return scores, epochs, kept


def about(
    settings: Settings, impressions: Impressions, features: Features, epochs: dict[str, list[int]]
) -> dict[str, Any]:
    of_part = {part: impressions.parts_R == number for number, part in enumerate(PARTS)}
    return {
        "rows": {part: int(chosen.sum()) for part, chosen in of_part.items()},
        "like_rate": float(impressions.labels_R[of_part["test"]].mean()),
        "with_user_vector": {
            part: float(features.with_user_vector[chosen].mean()) for part, chosen in of_part.items()
        },
        "refresh_hours": settings.ranking.refresh_hours,
        "lag_minutes": settings.ranking.lag_minutes,
        "days": {
            "prepare.test_from": settings.prepare.test_from,
            "ranking.valid_from": settings.ranking.valid_from,
            "ranking.test_from": settings.ranking.test_from,
        },
        "epochs": epochs,
    }


def check_serving(
    settings: Settings, store: FeatureStore, trained: Trained, prepared: Prepared, impressions: Impressions
) -> int:
    """Random pairs as a request reads them online, beside the same pairs joined offline at the same moment:
    equal scores, or else the ranker would not be the one that was measured. Returns how many.

    Raises:
        DataError: a score differs.
    """
    users, items = named(prepared)
    random = np.random.default_rng(settings.run.seed)
    user_ids, item_ids = random.choice(users, SERVED_PAIRS), random.choice(items, SERVED_PAIRS)
    user_ids[0] = "nobody has ever seen this user"
    every, lag = settings.ranking.refresh_hours * 3600, settings.ranking.lag_minutes * 60
    now = int(impressions.times_R[-1] + every + lag) + 60  # every refresh can be read
    offline = read_offline(store, user_ids, item_ids, np.full(SERVED_PAIRS, now), trained.width)
    online = read_online(store, user_ids.tolist(), item_ids.tolist(), now, trained.width)
    trained_on, served = trained.scores(offline), trained.scores(online)
    differ = np.flatnonzero(np.abs(trained_on - served) > 1e-6)
    if len(differ):
        raise DataError(
            "are scored otherwise from online features than from offline ones",
            where="rank",
            count=(len(differ), SERVED_PAIRS),
            examples=[f"{user_ids[row]} and {item_ids[row]}" for row in differ[:3]],
        )
    return SERVED_PAIRS


def _write_impressions(path: Path, features: Features, impressions: Impressions) -> None:
    """What `feature_repo/train_ranker.py` starts from."""
    moments = pa.array(impressions.times_R * 1_000_000, pa.int64()).cast(pa.timestamp("us", "UTC"))
    columns = {
        "user_id": pa.array(features.user_ids_R, pa.string()),
        "item_id": pa.array(features.item_ids_R, pa.string()),
        "event_timestamp": moments,
        "label": impressions.labels_R,
        "part": pa.array([PARTS[part] for part in impressions.parts_R], pa.string()),
    }
    parquet.write_table(pa.table(columns), path, compression="zstd")


def _write_scores(
    path: Path,
    features: Features,
    labels_R: npt.NDArray[np.int64],
    scores: dict[str, list[npt.NDArray[np.float64]]],
) -> None:
    columns = {
        "user_id": pa.array(features.user_ids_R, pa.string()),
        "item_id": pa.array(features.item_ids_R, pa.string()),
        "timestamp": features.times_R,
        "label": labels_R,
        **{variant: np.mean(of_seeds, axis=0) for variant, of_seeds in scores.items()},
    }
    parquet.write_table(pa.table(columns), path, compression="zstd")
