"""Probes: positions beside a history that read its first events and themselves, and that nobody else sees.

Discriminative recommendation (HLLM, section 3.3) appends something to a history and judges by the output
there: the candidate itself (early fusion) or the learned [USER] vector (late fusion). A probe leaves the
history's own outputs as they are. So one pass over a training window judges every event of it, each from the
events before it, beside the generative loss; and one pass over a user's history judges any number of
candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hllm.models.common.history import UNKNOWN_ITEM, History
from hllm.models.common.packing import Packing, attend, on_device

# T events of all histories, S histories, P probes, X = T + P positions, H heads, K heads of keys and values,
# G queries per key head, E width of a head; in a run of alike histories C histories of L events with N probes
# each


@dataclass(frozen=True)
class Probes:
    """A probe belongs to one history and stands after the first `reads_P` of its events."""

    sequence_P: npt.NDArray[np.int64]
    """Number of the history; must not decrease."""
    reads_P: npt.NDArray[np.int64]
    items_P: npt.NDArray[np.int64]
    """The candidate, or UNKNOWN_ITEM."""
    times_P: npt.NDArray[np.int64]
    """When the candidate was, or would be, shown (seconds UTC, or UNKNOWN_TIME)."""

    @classmethod
    def of_targets(cls, history: History, targets_T: npt.NDArray[np.int64]) -> Probes:
        """One probe per training target, after the events that it is predicted from."""
        packing = history.packing
        return cls(packing.sequence_T, packing.positions_T + 1, targets_T, history.next_times_T)

    @classmethod
    def after(
        cls,
        packing: Packing,
        after_P: npt.NDArray[np.int64],
        items_P: npt.NDArray[np.int64],
        times_P: npt.NDArray[np.int64],
    ) -> Probes:
        """A probe after each of these events of the T (numbers of them, history by history)."""
        return cls(packing.sequence_T[after_P], packing.positions_T[after_P] + 1, items_P, times_P)

    def without_items(self) -> Probes:
        """The same places, for something that is no item."""
        return Probes(self.sequence_P, self.reads_P, np.full_like(self.items_P, UNKNOWN_ITEM), self.times_P)


@dataclass(frozen=True)
class Run:
    """Neighbouring histories of equal length with equally many probes."""

    count: int
    length: int
    probes: int
    first_event: int
    first_probe: int


@dataclass(frozen=True)
class ProbedPacking:
    """Histories, then their probes, in one flat tensor; what `Packing` is to histories alone."""

    histories: Packing
    probes: Probes
    device: torch.device

    @cached_property
    def positions_T(self) -> npt.NDArray[np.int64]:
        """A probe's position is that of the next event, whatever else is probed there."""
        return np.concatenate([self.histories.positions_T, self.probes.reads_P])

    @cached_property
    def runs(self) -> list[Run]:
        sequence_P, lengths_S = self.probes.sequence_P, self.histories.lengths_S
        if (np.diff(sequence_P) < 0).any():
            raise ValueError("probes are sorted by the history they belong to")
        probes_S = np.bincount(sequence_P, minlength=len(lengths_S))
        new_S = np.append(True, (np.diff(lengths_S) != 0) | (np.diff(probes_S) != 0))
        firsts = np.flatnonzero(new_S)
        counts = np.diff(np.append(firsts, len(lengths_S)))
        before_S = np.cumsum(probes_S) - probes_S
        return [
            Run(
                int(count),
                int(lengths_S[at]),
                int(probes_S[at]),
                int(self.histories.starts_S[at]),
                int(before_S[at]),
            )
            for at, count in zip(firsts, counts, strict=True)
            if probes_S[at]
        ]

    @cached_property
    def reads(self) -> Tensor:
        return on_device(self.probes.reads_P, self.device)

    def attend(
        self,
        query_HXE: Tensor,
        key_KXE: Tensor,
        value_KXE: Tensor,
        scale: float | None,
        dropout: float = 0.0,
        window: int | None = None,
    ) -> Tensor:
        """Events attend as they do without probes; a probe attends to its events and to itself: (H, X, E) ->
        same."""
        events = self.histories.tokens
        own = [part[:, :events] for part in (query_HXE, key_KXE, value_KXE)]
        parts = [attend(own[0], own[1], own[2], self.histories, scale, dropout, window)]
        scale = query_HXE.shape[-1] ** -0.5 if scale is None else scale
        for run in self.runs:
            past = slice(run.first_event, run.first_event + run.count * run.length)
            here = slice(run.first_probe, run.first_probe + run.count * run.probes)
            key_KCLE, value_KCLE = (
                part[:, past].unflatten(1, (run.count, run.length)) for part in (key_KXE, value_KXE)
            )
            query_HCNE, key_KCNE, value_KCNE = (
                part[:, events:][:, here].unflatten(1, (run.count, run.probes))
                for part in (query_HXE, key_KXE, value_KXE)
            )
            query_KGCNE = query_HCNE.unflatten(0, (key_KXE.shape[0], -1))
            past_KGCNL = query_KGCNE @ key_KCLE[:, None].transpose(-1, -2)
            self_KGCN1 = (query_KGCNE * key_KCNE[:, None]).sum(-1, keepdim=True)
            reads_CN1 = self.reads[here].view(run.count, run.probes, 1)
            places_L = torch.arange(run.length, device=self.device)
            seen_CNL = places_L < reads_CN1
            if window is not None:
                seen_CNL = seen_CNL & (places_L > reads_CN1 - window)
            scores = (
                torch.cat([past_KGCNL.masked_fill(~seen_CNL, -torch.inf), self_KGCN1], -1).float() * scale
            )
            weights = scores.softmax(-1).to(value_KXE.dtype)
            if dropout:
                weights = torch.nn.functional.dropout(weights, dropout)
            out_KGCNE = weights[..., :-1] @ value_KCLE[:, None] + weights[..., -1:] * value_KCNE[:, None]
            parts.append(out_KGCNE.flatten(0, 1).flatten(1, 2))
        return torch.cat(parts, dim=1)
