"""Read the vectors of the model that serves now: online for one request, offline for a training table.

python feature_repo/read_features.py --user 196 --items 242 302 377
python feature_repo/read_features.py --repo runs/demo/publish/v3 --user 196 --items 242 302
"""

import argparse
import os
import warnings
from contextlib import suppress
from pathlib import Path

import ibis
import pandas as pd
from feast import FeatureStore
from mlflow.exceptions import MlflowException
from read_s3 import reach_s3

HERE = Path(__file__).resolve().parent
warnings.simplefilter("ignore")  # Feast and MLflow announce their own deprecations


def serving_service(store: FeatureStore, model: str) -> str:
    """The champion's service; the one promoted last if the alias was moved to a version without vectors."""
    with suppress(MlflowException):  # the alias was removed
        champion = store.mlflow.client.get_model_version_by_alias(model, "champion")
        if champion.tags.get("publication") == "verified":
            return store.mlflow.resolve_features(f"models:/{model}/{champion.version}")
    found = store.mlflow.client.search_registered_models(f"name = '{model}'")
    if not found or "hllm.serving_version" not in found[0].tags:
        raise SystemExit(f"No version of {model} serves yet: approve one in Airflow, or run `hllm promote`.")
    return store.mlflow.resolve_features(f"models:/{model}/{found[0].tags['hllm.serving_version']}")


def online(store: FeatureStore, service: str, user: str, items: list[str]) -> pd.DataFrame:
    """What one ranking request reads: the user beside every candidate. Unknown ids read as null."""
    rows = [{"user_id": user, "item_id": item} for item in items]
    return store.get_online_features(store.get_feature_service(service), entity_rows=rows).to_df()


def offline(store: FeatureStore, service: str, events: pd.DataFrame) -> pd.DataFrame:
    """`events` (user_id, item_id, event_timestamp) with the vectors that could be read at that time."""
    return store.get_historical_features(events, store.get_feature_service(service)).to_df()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", default=str(HERE), help="folder with a feature_store.yaml")
    parser.add_argument("--model", default="hllm")
    parser.add_argument("--user", required=True)
    parser.add_argument("--items", required=True, nargs="+")
    args = parser.parse_args()
    if not (Path(args.repo) / "feature_store.yaml").is_file():
        parser.error(f"--repo {args.repo}: no feature_store.yaml there; `hllm publish` names such a folder")
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{HERE.parent / 'runs/mlflow.db'}")
    pd.set_option("display.width", 200, "display.max_columns", None, "display.max_colwidth", 28)
    store = FeatureStore(args.repo)
    reach_s3(store)
    service = serving_service(store, args.model)
    print(f"online, {service}:\n{online(store, service, args.user, args.items)}\n")
    moments = [pd.Timestamp.now("UTC"), pd.Timestamp("2000-01-01", tz="UTC")]  # in 2000 nothing could be read
    events = pd.DataFrame({"user_id": args.user, "item_id": args.items[0], "event_timestamp": moments})
    print(f"offline, {service}:\n{offline(store, service, events)}")
    ibis.get_backend().con = None  # or DuckDB, which reads the offline files, reports leaked objects at exit
