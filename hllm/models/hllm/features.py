"""What the User LLM is told of an event beside its item's vector: when it happened, and which item it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.history import UNKNOWN_TIME
from hllm.models.common.packing import on_device

PARTS = ("year", "month", "day", "hour", "minute", "second")
SIZES = (2100, 13, 32, 24, 60, 60)
# T events of all histories, P parts of a time, D vector width


def calendar(times_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Seconds UTC -> (T, 6) year, month, day, hour, minute, second. Years outside 0 to 2099 become the
    nearest of them; an unknown time gives zeros."""
    known_T = times_T != UNKNOWN_TIME
    # Beyond these bounds numpy's calendar itself overflows; the year is clamped anyway.
    bounded_T = np.clip(np.where(known_T, times_T, 0), -(10**11), 10**11)
    moments_T = bounded_T.astype("datetime64[s]")
    years_T, months_T, days_T = (moments_T.astype(f"datetime64[{unit}]") for unit in "YMD")
    seconds_T = bounded_T - days_T.astype("datetime64[s]").astype(np.int64)
    parts_TP = np.stack(
        [
            years_T.astype(np.int64) + 1970,
            (months_T - years_T).astype(np.int64) + 1,
            (days_T - months_T).astype(np.int64) + 1,
            seconds_T // 3600,
            seconds_T // 60 % 60,
            seconds_T % 60,
        ],
        axis=1,
    )
    parts_TP[:, 0] = parts_TP[:, 0].clip(0, SIZES[0] - 1)
    return np.where(known_T[:, None], parts_TP, 0)


class TimeEmbedding(nn.Module):
    """Algorithm 1 of the HLLM paper: an embedding for each part of the time up to `precision`, concatenated,
    through an MLP to the user model's width. It starts at zero: a pretrained User LLM begins undisturbed."""

    def __init__(self, precision: str, part_width: int, width: int) -> None:
        super().__init__()
        self.precision, self.part_width = precision, part_width
        parts = PARTS.index(precision) + 1
        self.tables = nn.ModuleList(nn.Embedding(size, part_width) for size in SIZES[:parts])
        self.inner, self.outer = nn.Linear(parts * part_width, width), nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, times_T: npt.NDArray[np.int64]) -> Tensor:
        """(T,) seconds UTC -> (T, D); zeros where the time is unknown."""
        device = self.outer.weight.device
        parts_TP = on_device(calendar(times_T), device)
        parts = [table(parts_TP[:, part]) for part, table in enumerate(self.tables)]
        known_T = on_device(times_T != UNKNOWN_TIME, device)
        return self.outer(F.silu(self.inner(torch.cat(parts, -1)))) * known_T[:, None]


class EventFeatures(nn.Module):
    """Time and item-ID embeddings, summed into the User LLM's input (HLLM, table 12). Targets
    stay pure Item LLM vectors."""

    def __init__(self, width: int, time: str = "", time_width: int = 512, items: int = 0) -> None:
        super().__init__()
        self.time = TimeEmbedding(time, time_width, width) if time else None
        if items:
            self.ids = nn.Parameter(torch.zeros(items, width))
        self.items = items

    @property
    def shape(self) -> dict[str, object]:
        """What builds an equal one."""
        found: dict[str, object] = {"items": self.items}
        if self.time:
            found |= {"time": self.time.precision, "time_width": self.time.part_width}
        return found

    def forward(self, items_T: npt.NDArray[np.int64], times_T: npt.NDArray[np.int64]) -> Sequence[Tensor]:
        """Item indices (or UNKNOWN_ITEM) and seconds UTC (or UNKNOWN_TIME) -> one (T, D) tensor per feature;
        zeros where the item or the time is unknown."""
        found = []
        if self.time:
            found.append(self.time(times_T))
        if self.items:
            ids_T = on_device(items_T, self.ids.device)
            known_T = (ids_T >= 0) & (ids_T < self.items)
            found.append(F.embedding(ids_T.where(known_T, 0), self.ids) * known_T[:, None])
        return found
