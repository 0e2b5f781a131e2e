"""From nothing to a trained ranker: labelled events, a point-in-time join, two models, one ranked request.

    hllm rank -c configs/experiments/movielens-100k-ranking.toml     # names its output folder: .../rank/KEY
    python feature_repo/train_ranker.py .../rank/KEY

The folder holds `impressions.parquet` (user_id, item_id, event_timestamp, label, part: train, valid or test)
and a Feast store in `feast/`, with counts, categories and vectors as they could be read at any past moment.
For a ranker of your own, take your log and your store: everything below but these two names stays.
"""

import argparse
import warnings
from pathlib import Path

import ibis
import lightgbm
import numpy as np
import pandas as pd
from feast import FeatureStore
from sklearn.metrics import roc_auc_score

COUNTS = [f"{kind}_{what}" for kind in ("user", "item") for what in ("actions", "likes", "last_action")]
DIRECTIONS = 16  # a vector's first principal components: trees do not need all of it
warnings.simplefilter("ignore")


def joined(store: FeatureStore, events: pd.DataFrame) -> pd.DataFrame:
    """Every event with the features that could be read when it happened. In parts: Feast holds a part's
    vectors as Python lists to compute the affinity."""
    service, parts = store.get_feature_service("ranking"), []
    events = events.assign(row=np.arange(len(events)))
    for begin in range(0, len(events), 4000):
        parts.append(store.get_historical_features(events[begin : begin + 4000], service).to_df())
    return pd.concat(parts).sort_values("row", ignore_index=True)


def matrix(column: pd.Series, width: int) -> np.ndarray:
    """(rows, width); zeros where there is no vector."""
    return np.stack([np.zeros(width, np.float32) if v is None or np.ndim(v) == 0 else v for v in column])


class Columns:
    """Features as LightGBM takes them, fitted on the training rows."""

    def __init__(self, train: pd.DataFrame, vectors: bool) -> None:
        self.vectors = vectors
        self.ids = {kind: pd.Index(train[f"{kind}_id"].unique()) for kind in ("user", "item")}
        self.categories = sorted(set(train["item_categories"].dropna().explode().dropna()))
        self.width = max(np.size(v) for v in train["item_vector"])
        self.directions = {}
        for kind in ("user", "item"):
            known = matrix(train[f"{kind}_vector"], self.width)
            known = known[known.any(axis=1)]
            _, _, axes = np.linalg.svd(known - known.mean(axis=0), full_matrices=False)
            self.directions[kind] = axes[:DIRECTIONS].T

    def __call__(self, rows: pd.DataFrame, now: pd.Series) -> pd.DataFrame:
        seconds = now.astype("int64") // 10**9 if now.dtype.kind != "i" else now
        found = {}
        for kind in ("user", "item"):
            found[f"{kind}_id"] = self.ids[kind].get_indexer(rows[f"{kind}_id"])  # -1: not seen in training
            events, likes, last = (rows[name].astype(float) for name in COUNTS if name.startswith(kind))
            found[f"{kind}_events"], found[f"{kind}_liked"] = events, (likes + 5) / (events + 10)
            found[f"{kind}_ago"] = seconds - last
        for word in self.categories:
            found[f"is {word}"] = [words is not None and word in words for words in rows["item_categories"]]
        if self.vectors:
            found["affinity"] = rows["affinity"].astype(float)
            for kind, axes in self.directions.items():
                places = matrix(rows[f"{kind}_vector"], self.width) @ axes
                found |= {f"{kind} direction {at}": places[:, at] for at in range(places.shape[1])}
        return pd.DataFrame(found, index=rows.index)


def train(rows: pd.DataFrame, vectors: bool) -> tuple[lightgbm.LGBMClassifier, Columns]:
    """Trees until the validation AUC stops rising."""
    part = {name: rows[rows["part"] == name] for name in ("train", "valid")}
    columns = Columns(part["train"], vectors)
    table = {name: columns(of, of["event_timestamp"]) for name, of in part.items()}
    model = lightgbm.LGBMClassifier(
        n_estimators=600, learning_rate=0.03, num_leaves=15, min_child_samples=50, colsample_bytree=0.7,
        subsample=0.8, subsample_freq=1, cat_smooth=50, random_state=17, verbose=-1,
    )  # fmt: skip
    model.fit(
        table["train"],
        part["train"]["label"],
        eval_set=[(table["valid"], part["valid"]["label"])],
        eval_metric="auc",
        categorical_feature=["item_id"],
        callbacks=[lightgbm.early_stopping(50, verbose=False)],
    )
    return model, columns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="an output of `hllm rank`")
    folder = parser.parse_args().folder
    if not (folder / "feast" / "feature_store.yaml").is_file():
        parser.error(f"{folder} is no output of `hllm rank`: no feast/feature_store.yaml there")
    store = FeatureStore(folder / "feast")
    rows = joined(store, pd.read_parquet(folder / "impressions.parquet"))
    test = rows[rows["part"] == "test"]
    seen = test["user_vector"].notna().mean()
    print(f"{len(rows):,} impressions; {seen:.0%} of the test found a user vector")
    for vectors in (False, True):
        model, columns = train(rows, vectors)
        likes = model.predict_proba(columns(test, test["event_timestamp"]))[:, 1]
        auc = roc_auc_score(test["label"], likes)
        what = "with vectors" if vectors else "without vectors"
        print(f"{what}: test AUC {auc:.4f} after {model.best_iteration_} trees")

    # One request: a user and candidates, read online now, ranked by the model that reads vectors.
    user, candidates = test["user_id"].iloc[-1], test["item_id"].drop_duplicates().head(20).tolist()
    asked = [{"user_id": user, "item_id": item} for item in candidates]
    read = store.get_online_features(store.get_feature_service("ranking"), entity_rows=asked).to_df()
    now = pd.Series(int(test["event_timestamp"].max().timestamp()), index=read.index)
    read["probability"] = model.predict_proba(columns(read, now))[:, 1]
    best = read.nlargest(5, "probability")[["item_id", "probability", "affinity"]]
    print(f"user {user}, the best of {len(candidates)} candidates:\n{best.to_string(index=False)}")
    ibis.get_backend().con = None  # or DuckDB reports leaked objects at exit
