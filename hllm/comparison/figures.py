"""What the ranks of several models and seeds say: means, and intervals over users and seeds.

R held-out events, C model-and-seed pairs, M metrics, B bootstrap samples, E models, S seeds.

One bootstrap sample draws the users with replacement, the same users for every model, and for each model its
seeds with replacement: a difference between two models is paired by users and holds what other seeds would
have changed. With one seed the interval is over users alone, and says nothing about luck with the start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hllm.comparison.file import JUDGED, LOSS, Comparison, Metric
from hllm.comparison.loss import scale_of, softmax_loss
from hllm.comparison.work import Pipeline
from hllm.data.prepared import Prepared
from hllm.errors import DataError
from hllm.evaluation.auc import METRICS, aucs
from hllm.evaluation.evaluate import held_out_vectors
from hllm.evaluation.labelled import cosines, labelled_rows, read_scores, untrained_scores
from hllm.evaluation.measure import PART
from hllm.evaluation.metrics import Interval, gains, metric_names, resampled_means
from hllm.evaluation.segments import segments
from hllm.models.common.ranking import HeldOut
from hllm.models.family import untrained

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """The held-out events with a label, and how every model and seed scores them (L events)."""

    labels_L: Ints
    users_L: Ints
    scores_L: Mapping[tuple[str, int], Floats]


@dataclass(frozen=True)
class Ranked:
    """The held-out events, and the ranks of every model and seed on them."""

    users_R: Ints
    parts: Mapping[str, npt.NDArray[np.bool_]]
    """Segment -> which events belong to it."""
    ranks_R: Mapping[tuple[str, int], Ints]
    """(model, seed) -> ranks."""
    losses_R: Mapping[tuple[str, int], Floats] = field(default_factory=dict)
    """(model, seed) -> held-out losses, where they are asked for."""
    judged: Judged | None = None

    def gains(self, name: str, seed: int, metrics: Sequence[Metric]) -> Floats:
        """(R, M) what each event adds to each metric; NaN where the model has none."""
        ranks_R = self.ranks_R[name, seed]
        cutoffs = sorted({int(metric.name.partition("@")[2]) for metric in metrics if metric.name != LOSS})
        columns = dict(zip(metric_names(cutoffs), gains(ranks_R, cutoffs).T, strict=True))
        columns[LOSS] = self.losses_R.get((name, seed), np.full(len(ranks_R), np.nan))
        return np.stack([columns[metric.name] for metric in metrics], axis=1)


@dataclass(frozen=True)
class Figures:
    """`found[model][metric]`, and every other model's difference from the reference and ratio to it."""

    found: Mapping[str, Mapping[str, Interval]]
    differences: Mapping[str, Mapping[str, Interval]]
    ratios: Mapping[str, Mapping[str, Interval]]
    samples: Mapping[str, Mapping[str, Floats]]
    """(B,) bootstrap samples of each figure, in common for all models."""
    events: Mapping[str, int]
    """Held-out events behind each metric."""


def ranked(comparison: Comparison, found: Sequence[Pipeline]) -> Ranked:
    """Read the ranks of all models; work out losses and scores of labelled events where a metric asks for
    them.

    Raises:
        DataError: two models were not asked about the same events.
    """
    first, wanted = found[0], {metric.name for metric in comparison.metrics}
    prepared = Prepared.open(first.folder("prepare"))
    held_out = HeldOut.of(prepared, PART)
    events = np.stack([held_out.users_R, held_out.positions_R], axis=1)
    ranks: dict[tuple[str, int], Ints] = {}
    losses: dict[tuple[str, int], Floats] = {}
    scores: dict[tuple[str, int], Floats] = {}
    rows = labelled_rows(prepared, held_out)
    judged = held_out.take(rows)
    for pipeline in found:
        name, label = (pipeline.entry.name, pipeline.seed), pipeline.entry.label
        own_events, ranks[name] = read_ranks(pipeline, label)
        if not np.array_equal(own_events, events):
            raise DataError(
                f"{pipeline.entry.name} was asked about other held-out events than {first.entry.name}",
                where=comparison.name,
                remedy="The models of a comparison share the data, the split and prepare.k_core.",
            )
        for family in untrained():
            ranks[family.title, pipeline.seed] = read_ranks(pipeline, family.name)[1]
        if LOSS in wanted:
            users_RD, items_ID = held_out_vectors(pipeline.context, label, prepared, held_out)
            scale = scale_of(pipeline.folder(f"train-{label}"))
            losses[name] = softmax_loss(users_RD, items_ID, scale, held_out)
        if not wanted.isdisjoint(JUDGED):
            scores[name] = scores_of(pipeline, label, prepared, judged)
            known = untrained_scores(pipeline.settings, prepared, judged)
            for family in untrained():
                if family.name in known:
                    scores[family.title, pipeline.seed] = known[family.name]
    labels_L = np.asarray(prepared.event_labels)[held_out.positions_R[rows]].astype(np.int64)
    return Ranked(
        held_out.users_R,
        segments(prepared, held_out, first.settings.evaluation),
        ranks,
        losses,
        Judged(labels_L, held_out.users_R[rows], scores) if scores else None,
    )


def scores_of(pipeline: Pipeline, label: str, prepared: Prepared, judged: HeldOut) -> Floats:
    """(L,) how a model scores labelled events: as its evaluation wrote them if the model is discriminative,
    else by what it ranks items with."""
    written = pipeline.folder("evaluate") / "labelled.parquet"
    if written.exists():
        return read_scores(written, label, judged)
    return cosines(*held_out_vectors(pipeline.context, label, prepared, judged), judged)


def read_ranks(pipeline: Pipeline, label: str) -> tuple[Ints, Ints]:
    """(R, 2) user and position of every held-out event, and (R,) the rank of its item."""
    import pyarrow.parquet as parquet

    path = pipeline.folder("evaluate") / "ranks.parquet"
    table = parquet.read_table(path, filters=[("model", "=", label)])
    events = np.stack([table[name].to_numpy() for name in ("user_index", "position")], axis=1)
    kind = "filtered" if pipeline.settings.evaluation.filter_history else "unfiltered"
    return events.astype(np.int64), table[f"rank_{kind}"].to_numpy().astype(np.int64)


def figures(
    metrics: Sequence[Metric],
    names: Sequence[str],
    seeds: Sequence[int],
    reference: str,
    found: Ranked,
    samples: int,
    confidence: float,
    seed: int,
) -> Figures:
    """Means over seeds of every metric of every model, with intervals, and the same against the reference."""
    values: dict[str, dict[str, float]] = defaultdict(dict)
    drawn: dict[str, dict[str, Floats]] = defaultdict(dict)
    events: dict[str, int] = {}
    shares_ESB = _seed_draws(len(names), len(seeds), samples, seed)

    def keep(wanted: Sequence[Metric], means_ESM: Floats, means_BESM: Floats) -> None:
        for e, name in enumerate(names):
            means_BM = np.einsum("bsm,sb->bm", means_BESM[:, e], shares_ESB[e])
            for m, metric in enumerate(wanted):
                if not np.isnan(means_ESM[e, :, m]).any():
                    values[name][str(metric)] = float(means_ESM[e, :, m].mean())
                    drawn[name][str(metric)] = means_BM[:, m]

    ranking = [metric for metric in metrics if metric.name not in JUDGED]
    for segment in dict.fromkeys(metric.segment for metric in ranking):
        inside_R = found.parts[segment] if segment else np.ones(len(found.users_R), bool)
        wanted = [metric for metric in ranking if metric.segment == segment]
        users_R = found.users_R[inside_R]
        events |= {str(metric): len(users_R) for metric in wanted}
        if len(users_R):
            gains_RC = np.concatenate(
                [found.gains(name, one, wanted)[inside_R] for name in names for one in seeds], axis=1
            )
            shape = (len(names), len(seeds), len(wanted))
            means_BESM = resampled_means(gains_RC, users_R, samples, seed).reshape(samples, *shape)
            keep(wanted, gains_RC.mean(axis=0).reshape(shape), means_BESM)
    judging = [metric for metric in metrics if metric.name in JUDGED]
    if judging and found.judged:
        judged, columns = found.judged, [METRICS.index(metric.name) for metric in judging]
        events |= {str(metric): len(judged.labels_L) for metric in judging}
        of_each = [
            [
                aucs(judged.labels_L, judged.scores_L[name, one], judged.users_L, samples, seed)
                for one in seeds
            ]
            for name in names
        ]
        means_ESM = np.array([[one.values_3[columns] for one in row] for row in of_each])
        draws_ESBM = np.array([[one.draws_B3[:, columns] for one in row] for row in of_each])
        keep(judging, means_ESM, draws_ESBM.transpose(2, 0, 1, 3))
    return Figures(
        found={
            name: {
                metric: _interval(value, drawn[name][metric], confidence)
                for metric, value in values[name].items()
            }
            for name in names
        },
        differences=_against(values, drawn, reference, np.subtract, confidence),
        ratios=_against(values, drawn, reference, np.divide, confidence),
        samples=drawn,
        events=events,
    )


def _seed_draws(models: int, seeds: int, samples: int, seed: int) -> Floats:
    """(E, S, B) the weight of each seed in each sample: drawn with replacement, for each model on its own."""
    rng = np.random.default_rng((seed, 1))
    drawn_EBS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=(models, samples))
    return drawn_EBS.transpose(0, 2, 1) / seeds


def _against(  # type: ignore[no-untyped-def]
    values: Mapping[str, Mapping[str, float]],
    drawn: Mapping[str, Mapping[str, Floats]],
    reference: str,
    compared,
    confidence: float,
) -> dict[str, dict[str, Interval]]:
    """Every other model less (or divided by) the reference; nothing is divided by zero."""
    found: dict[str, dict[str, Interval]] = {}
    for name in values:
        if name != reference:
            found[name] = {
                metric: _interval(
                    float(compared(value, values[reference][metric])),
                    compared(drawn[name][metric], drawn[reference][metric]),
                    confidence,
                )
                for metric, value in values[name].items()
                if metric in values[reference]
                if compared is np.subtract or (drawn[reference][metric] > 0).all()
            }
    return found


def _interval(value: float, values_B: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values_B, [tail, 1 - tail])
    return {"value": value, "low": float(low), "high": float(high)}
