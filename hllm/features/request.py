"""What one ranking request reads from Feast, as a table for people."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from hllm.features.store import open_store, service_errors
from hllm.features.views import service_name
from hllm.settings import Settings


def request_table(settings: Settings, version: int, user: str, items: list[str]) -> str:
    """The user beside every candidate: the first numbers of both vectors, the affinity, the model version."""
    with service_errors(settings):
        store = open_store(settings)
        rows = [{"user_id": user, "item_id": item} for item in items]
        service = store.get_feature_service(service_name(version))
        read = store.get_online_features(features=service, entity_rows=rows).to_dict()
    table = [
        (
            user,
            item,
            _short(read["user_vector"][row]),
            _short(read["item_vector"][row]),
            _score(read["affinity"][row]),
            read["user_model_version"][row] or "null",
            read["item_model_version"][row] or "null",
        )
        for row, item in enumerate(items)
    ]
    headers = ("user", "item", "user vector", "item vector", "affinity", "user version", "item version")
    return tabulate(table, headers=headers, disable_numparse=True)


def _short(vector: list[float] | None) -> str:
    return "null" if vector is None else f"[{vector[0]:.3f} {vector[1]:.3f} ...] x {len(vector)}"


def _score(value: Any) -> str:
    return "null" if value is None else f"{value:.4f}"
