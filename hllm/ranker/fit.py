"""One ranker, trained in shuffled batches; the epoch that orders the validation rows best is kept."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch

from hllm.evaluation.auc import aucs
from hllm.ranker.network import Inputs, Ranker, probabilities
from hllm.settings import Ranking


def fit(
    variant: str,
    shape: dict[str, int],
    train: tuple[Inputs, npt.NDArray[np.int64]],
    valid: tuple[Inputs, npt.NDArray[np.int64]],
    settings: Ranking,
    seed: int,
) -> tuple[Ranker, int]:
    """The ranker of the best epoch, and which one that was (from 1). The same seed gives the same ranker."""
    torch.manual_seed(seed)
    model = Ranker(variant, shape, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    inputs, labels = train[0], torch.from_numpy(train[1]).float()
    best, best_epoch, best_weights = -np.inf, 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for rows in torch.randperm(len(inputs)).split(settings.batch_size):
            optimizer.zero_grad()
            model.loss(inputs.take(rows), labels[rows]).backward()
            optimizer.step()
        found = auc(valid[1], probabilities(model, valid[0]))
        if found > best:
            best, best_epoch, best_weights = found, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_weights)
    return model.eval(), best_epoch


def auc(labels_R: npt.NDArray[np.int64], scores_R: npt.NDArray[np.float64]) -> float:
    return float(aucs(labels_R, scores_R, np.arange(len(labels_R)), samples=0, seed=0).values_3[0])
