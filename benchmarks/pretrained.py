"""Are pretrained weights loaded, and what are they worth? SmolLM2's first layers beside a random start.

    python benchmarks/pretrained.py [--config FILE] [--set a.b=c ...] [--prepared FOLDER] [--steps 40]

One settings file (the demo's, unless told), twice, with nothing different but `hllm.item_llm.pretrained`
(the whitening is of each start's own vectors): the loss on the very same first batch, then Recall@50 and
NDCG@10 on the validation events (whole catalogue, history left out) before training and after a few steps of
stage 1. A difference counts when its interval, from resampled users, leaves out 0; the claim is about
NDCG@10. Without --prepared the steps ingest, validate and prepare run first.
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
from hllm.data.prepared import Prepared
from hllm.evaluation.metrics import compare_ranks, gains
from hllm.models.common.recommender import Recommender
from hllm.models.load import new_model
from hllm.pipeline import keys
from hllm.settings import Settings
from hllm.training.batches import Batches
from hllm.training.checkpoint import Checkpoints
from hllm.training.loop import fit
from hllm.training.train import validation_ranks
from hllm.work.artifacts import Store

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
CUTOFFS = (10, 50)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="settings file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument("--prepared", type=Path, help="output folder of `hllm prepare` with these settings")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = 2 if args.quick else args.steps
    print(machine(args.threads))
    figures, runs = Figures("pretrained"), {}
    with tempfile.TemporaryDirectory() as name:
        ours, random = (
            settings_module.load(
                args.config,
                [*args.set, *overrides(Path(name)), f"hllm.item_llm.pretrained={pretrained}"],
            )
            for pretrained in ("true", "false")
        )
        prepared = Prepared.open(args.prepared or prepare(args.config, args.set, ours, Path(name)))
        for start, settings in (("pretrained", ours), ("random", random)):
            (Path(name) / start).mkdir()
            runs[start] = run(settings, prepared, steps, Path(name) / start)
    report(figures, runs["pretrained"], runs["random"], steps)
    figures.finish(args.figures)


def report(figures: Figures, ours: Run, random: Run, steps: int) -> None:
    """Prints both runs, and what their differences are worth."""
    print_table(
        [
            (start, f"{found.first_loss:.4f}", *means(found.before_R), *means(found.after_R))
            for start, found in (("pretrained", ours), ("random", random))
        ],
        ("start", "loss of step 1", "Recall@50 and NDCG@10 before", "", f"after {steps} steps", ""),
    )
    figures.claim(
        "the first loss differs from a random start's",
        f"{ours.first_loss:.4f} and {random.first_loss:.4f}",
        "different",
        abs(ours.first_loss - random.first_loss) > 1e-3,
    )
    compared = compare_ranks(ours.after_R, random.after_R, ours.users_R, CUTOFFS, 1000, 0.95, seed=1)
    for name in ("ndcg@10", "recall@50"):
        difference = compared[name]["difference"]
        assert difference is not None
        low, high = difference["low"], difference["high"]
        what = f"{name} after {steps} steps, pretrained less random, {len(ours.users_R):,} events"
        found = f"{difference['value']:+.4f} (95 % of resamples: {low:+.4f} to {high:+.4f})"
        if name == "ndcg@10":
            figures.claim(what, found, "above 0", low > 0)
        else:
            figures.add(what, found)
            print(f"{what}: {found}")


def overrides(folder: Path) -> list[str]:
    return [
        f"run.root={folder / 'runs'}",
        f"mlflow.tracking_uri=sqlite:///{folder / 'mlflow.db'}",
        f"mlflow.artifact_root={folder / 'mlflow'}",
    ]


def prepare(config: Path, chosen: list[str], settings: Settings, folder: Path) -> Path:
    """Run the first three steps as anybody would; the output of the last one."""
    sets = [argument for value in [*chosen, *overrides(folder)] for argument in ("--set", value)]
    for step in ("ingest", "validate", "prepare"):
        command = [str(Path(sys.executable).with_name("hllm")), step, "--config", str(config), *sets]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Store(settings.run.root).fetch("prepare", keys(settings)["prepare"])


@dataclass(frozen=True)
class Run:
    """The first loss; the ranks of the held-out items as the weights come and after training; whose they
    are."""

    first_loss: float
    before_R: np.ndarray
    after_R: np.ndarray
    users_R: np.ndarray


def run(settings: Settings, prepared: Prepared, steps: int, work: Path) -> Run:
    stage = settings.hllm.stage1.model_copy(update={"steps": steps, "evaluate_every": 0})
    model = new_model(settings, "hllm", prepared)
    batches = Batches(
        prepared, stage.history_length, stage.batch_size, stage.negatives, settings.run.seed + 1
    )
    before_R, users_R = ranks(model, prepared, settings)
    trained = fit(
        model,
        batches,
        stage,
        seed=settings.run.seed,
        checkpoints=Checkpoints(work),
        stopping=threading.Event(),
        log=lambda values, at: None,
    )
    after_R, _ = ranks(model, prepared, settings)
    return Run(trained.first_loss, before_R, after_R, users_R)


def ranks(model: Recommender, prepared: Prepared, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the validation events, and whose they are."""
    model.eval()
    with torch.no_grad():
        return validation_ranks(model, prepared, settings.embed.max_history, settings.embed.tokens_per_batch)


def means(ranks_R: np.ndarray) -> tuple[str, str]:
    """Recall@50 and NDCG@10."""
    _, recall, ndcg, _ = gains(ranks_R, CUTOFFS).mean(axis=0)
    return f"{recall:.4f}", f"{ndcg:.4f}"


if __name__ == "__main__":
    main()
