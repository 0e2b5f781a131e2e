"""Pretrained weights are really loaded and worth something: SmolLM2's first layers beside a random start.

    python benchmarks/pretrained.py [--prepared FOLDER] [--steps 60]

The demo's settings on MovieLens-100K, twice, with nothing different but `pretrained`: the loss on the very
same first batch, and NDCG@10 on the validation events (whole catalogue, history left out) before training
and after a few steps of stage 1. A difference counts when its interval, from
resampled users, leaves out 0: the random start is the same in everything else, also in the whitening.
Without --prepared the steps ingest, validate and prepare run first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import Figures, arguments, machine, print_table

from hllm import settings as settings_module
from hllm.artifacts import Store
from hllm.data.prepared import Prepared
from hllm.embedding.users import held_out_user_vectors
from hllm.evaluation.metrics import compare_ranks, gains
from hllm.evaluation.ranking import HeldOut, rank_by_vectors
from hllm.models.load import new_model
from hllm.models.recommender import Recommender
from hllm.settings import Settings
from hllm.steps import keys
from hllm.training.batches import Batches
from hllm.training.loop import fit
from hllm.training.train import catalogue_vectors

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
STARTS = {"pretrained": "true", "random": "false"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--prepared", type=Path, help="output folder of `hllm prepare` with the demo's settings"
    )
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = 2 if args.quick else args.steps
    print(machine(args.threads))
    figures, runs = Figures("pretrained"), {}
    with tempfile.TemporaryDirectory() as name:
        prepared = Prepared.open(args.prepared or prepare(Path(name)))
        for start in STARTS:
            (Path(name) / start).mkdir()
            runs[start] = run(settings_of(Path(name), start), prepared, steps, Path(name) / start)
    held_out = HeldOut.of(prepared, "valid")
    print_table(
        [
            (
                start,
                *(f"{value:.4f}" for value in (found.first_loss, ndcg(found.before_R), ndcg(found.after_R))),
            )
            for start, found in runs.items()
        ],
        ("start", "loss of step 1", "NDCG@10 before training", f"NDCG@10 after {steps} steps"),
    )
    ours, random = runs["pretrained"], runs["random"]
    figures.claim(
        "the first loss differs from a random start's",
        f"{ours.first_loss:.3f} and {random.first_loss:.3f}",
        "different",
        abs(ours.first_loss - random.first_loss) > 0.01,
    )
    compared = compare_ranks(ours.after_R, random.after_R, held_out.users_R, [10], 1000, 0.95, seed=1)
    difference = compared["ndcg@10"]["difference"]
    assert difference is not None
    low, high = difference["low"], difference["high"]
    figures.claim(
        f"NDCG@10 after {steps} steps, pretrained less random, {len(held_out):,} events",
        f"{difference['value']:+.4f} (95 % of resamples: {low:+.4f} to {high:+.4f})",
        "above 0",
        low > 0,
    )
    figures.finish(args.figures)


def settings_of(folder: Path, start: str = "pretrained") -> Settings:
    random = [f"model.{tower}.pretrained={STARTS[start]}" for tower in ("item_llm", "user_llm")]
    return settings_module.load(CONFIG, [*overrides(folder), *random])


def overrides(folder: Path) -> list[str]:
    return [
        f"run.root={folder / 'runs'}",
        f"mlflow.tracking_uri=sqlite:///{folder / 'mlflow.db'}",
        f"mlflow.artifact_root={folder / 'mlflow'}",
    ]


def prepare(folder: Path) -> Path:
    """Run the first three steps as anybody would; the output of the last one."""
    sets = [argument for override in overrides(folder) for argument in ("--set", override)]
    for step in ("ingest", "validate", "prepare"):
        command = [str(Path(sys.executable).with_name("hllm")), step, "--config", str(CONFIG), *sets]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    settings = settings_of(folder)
    return Store(settings.run.root).fetch("prepare", keys(settings)["prepare"])


@dataclass(frozen=True)
class Run:
    """The first loss, and the ranks of the held-out items as the weights come and after training."""

    first_loss: float
    before_R: np.ndarray
    after_R: np.ndarray


def run(settings: Settings, prepared: Prepared, steps: int, work: Path) -> Run:
    stage = settings.train.stage1.model_copy(update={"steps": steps, "evaluate_every": 0})
    model = new_model(settings, "hllm", prepared)
    batches = Batches(
        prepared, stage.history_length, stage.batch_size, stage.negatives, settings.run.seed + 1
    )
    before_R = ranks(model, prepared, settings)
    trained = fit(
        model,
        batches,
        stage,
        seed=settings.run.seed,
        work=work,
        stopping=threading.Event(),
        log=lambda values, at: None,
    )
    return Run(trained.first_loss, before_R, ranks(model, prepared, settings))


def ranks(model: Recommender, prepared: Prepared, settings: Settings) -> np.ndarray:
    """Where each validation event's item stands in the whole catalogue, the user's history left out."""
    model.eval()
    held_out, embed = HeldOut.of(prepared, "valid"), settings.embed
    vectors_ID = catalogue_vectors(model, prepared, embed.tokens_per_batch)
    users_RD = held_out_user_vectors(
        model.user, vectors_ID, prepared, held_out.users_R, held_out.positions_R, embed.max_history, 256
    )
    return np.asarray(rank_by_vectors(users_RD, vectors_ID, held_out, "validation").filtered_R)


def ndcg(ranks_R: np.ndarray) -> float:
    return float(gains(ranks_R, [10])[:, 1].mean())


if __name__ == "__main__":
    main()
