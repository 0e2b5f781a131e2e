"""Neighbours of items, without any training: who is bought beside whom, and who reads alike.

Statistics come from training events and from texts alone. A history counts by its last events, the newest
most. What a trained model does not beat these in, it has not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.models.common.ranking import Floats, HeldOut, Ints, Ranks, training_counts

if TYPE_CHECKING:
    import scipy.sparse as sparse

Scorer = Callable[[Sequence[Ints]], Floats]
"""(B,) histories, oldest event first -> (B, I) scores of every item."""

WINDOW = 10
"""Events that lie further apart are no neighbours, and older events of a history say nothing."""
DECAY = 0.7
"""Weight of an event of a history beside the one after it."""
BACKWARD = 0.5
"""Weight of what came before an item beside what came after it."""
BLOCK = 256
# B histories, I items, W words


def co_occurrence(prepared: Prepared) -> sparse.csr_matrix:
    """(I, I): how often the row's item was followed by the column's (and, with less weight, the other way
    round) within WINDOW events of one user, by 1 / distance, over the root of both items' training events."""
    import scipy.sparse as sparse

    items, count = np.asarray(prepared.event_items, np.int64), prepared.items
    starts, ends = np.asarray(prepared.train_starts), np.asarray(prepared.train_ends)
    offsets = np.asarray(prepared.user_offsets, np.int64)
    owner = np.repeat(np.arange(prepared.users), offsets[1:] - offsets[:-1])
    places = np.arange(len(items))
    trained = (places >= starts[owner]) & (places < ends[owner])
    pairs = sparse.csr_matrix((count, count), dtype=np.float32)
    for apart in range(1, WINDOW + 1):
        both = trained[:-apart] & trained[apart:] & (owner[:-apart] == owner[apart:])
        one, other = items[:-apart][both], items[apart:][both]
        weights = np.full(len(one), 1 / apart, np.float32)
        pairs = pairs + sparse.coo_matrix((weights, (one, other)), (count, count)).tocsr()
    scale = sparse.diags((1 / np.sqrt(training_counts(prepared) + 1)).astype(np.float32))
    return (scale @ (pairs + BACKWARD * pairs.T) @ scale).tocsr()


def text_vectors(prepared: Prepared) -> sparse.csr_matrix:
    """(I, W) TF-IDF of the items' texts, unit length; words of very many or of single items do not count
    where others are left."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [text or "" for text in prepared.item_table(["text"])["text"].to_pylist()]
    for rare, frequent in ((2, 0.2), (1, 1.0)):
        words = TfidfVectorizer(
            stop_words="english", sublinear_tf=True, min_df=rare, max_df=frequent, dtype=np.float32
        )
        try:
            return words.fit_transform(texts).tocsr()
        except ValueError:  # no word is left
            continue
    import scipy.sparse as sparse

    return sparse.csr_matrix((len(texts), 1), dtype=np.float32)


def histories_matrix(histories: Sequence[Ints], items: int) -> sparse.csr_matrix:
    """(B, I): the last WINDOW events of each history, the newest with weight 1, each older one DECAY times
    the one after it."""
    import scipy.sparse as sparse

    last = [np.asarray(history, np.int64)[-WINDOW:] for history in histories]
    rows = np.repeat(np.arange(len(last)), [len(history) for history in last])
    weights = [DECAY ** np.arange(len(history))[::-1] for history in last]
    columns = np.concatenate([*last, np.zeros(0, np.int64)])
    values = np.concatenate([*weights, np.zeros(0)]).astype(np.float32)
    return sparse.coo_matrix((values, (rows, columns)), (len(last), items)).tocsr()


def knn_scorer(prepared: Prepared) -> Scorer:
    """Item-kNN: what stood beside the history's items."""
    beside, items = co_occurrence(prepared), prepared.items
    return lambda histories: np.asarray((histories_matrix(histories, items) @ beside).todense(), np.float32)


def text_scorer(prepared: Prepared) -> Scorer:
    """TF-IDF: what reads like the history's items."""
    words, items = text_vectors(prepared), prepared.items
    return lambda histories: np.asarray(
        ((histories_matrix(histories, items) @ words) @ words.T).todense(), np.float32
    )


def sum_scorer(prepared: Prepared) -> Scorer:
    """Both, each over its largest score."""
    scorers = (knn_scorer(prepared), text_scorer(prepared))

    def scores(histories: Sequence[Ints]) -> Floats:
        found = [scorer(histories) for scorer in scorers]
        top = [each / (each.max(axis=1, keepdims=True) + np.float32(1e-9)) for each in found]
        return np.asarray(top[0] + top[1], np.float32)

    return scores


def rank_by_scores(scorer: Scorer, held_out: HeldOut) -> Ranks:
    """Where each event's item stands by these scores; items with the same score stand before it."""
    filtered, unfiltered = np.zeros(len(held_out), np.int64), np.zeros(len(held_out), np.int64)
    for block in held_out.blocks(BLOCK):
        scores_BI, targets_B = scorer(_histories(held_out, block)), held_out.targets_R[block]
        own_B1 = scores_BI[np.arange(len(targets_B)), targets_B][:, None]
        ahead_BI = scores_BI >= own_B1
        unfiltered[block] = ahead_BI.sum(axis=1)  # its own score stands for the 1
        rows, items = held_out.seen(block)
        filtered[block] = unfiltered[block] - np.bincount(
            rows[ahead_BI[rows, items]], minlength=len(targets_B)
        )
    return Ranks(filtered, unfiltered)


def _histories(held_out: HeldOut, block: slice) -> list[Ints]:
    """The items that each event's user had before it."""
    return [
        np.asarray(held_out.event_items[start:end], np.int64)
        for start, end in zip(held_out.starts_R[block], held_out.positions_R[block], strict=True)
    ]


def scores_of_targets(scorer: Scorer, held_out: HeldOut) -> npt.NDArray[np.float64]:
    """(R,) the score of each event's own item."""
    found = np.zeros(len(held_out))
    for block in held_out.blocks(BLOCK):
        targets_B = held_out.targets_R[block]
        found[block] = scorer(_histories(held_out, block))[np.arange(len(targets_B)), targets_B]
    return found
