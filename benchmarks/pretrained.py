"""Pretrained weights are really loaded and worth something: SmolLM2's first layers beside a random start.

    python benchmarks/pretrained.py [--prepared FOLDER] [--steps 60]

The demo's settings on MovieLens-100K, twice, with nothing different but `pretrained`: the loss on the very
same first batch, and NDCG@10 on the validation events (whole catalogue, history left out) before training
and after a few steps of stage 1. Without --prepared the steps ingest, validate and prepare run first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from measure import Figures, arguments, machine, print_table

from hllm import settings as settings_module
from hllm.artifacts import Store
from hllm.data.prepared import Prepared
from hllm.models.load import new_model
from hllm.settings import Settings
from hllm.steps import keys
from hllm.training.batches import Batches
from hllm.training.loop import fit
from hllm.training.train import validation_ndcg

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
    figures, rows = Figures("pretrained"), []
    with tempfile.TemporaryDirectory() as name:
        prepared = Prepared.open(args.prepared or prepare(Path(name)))
        for start in STARTS:
            (Path(name) / start).mkdir()
            rows.append((start, *run(settings_of(Path(name), start), prepared, steps, Path(name) / start)))
    print_table(
        [(start, *(f"{value:.4f}" for value in found)) for start, *found in rows],
        (
            "start",
            "loss of step 1",
            "NDCG@10 before",
            f"loss of step {steps}",
            f"NDCG@10 after {steps} steps",
        ),
    )
    (_, first, *_, ndcg), (_, random_first, *_, random_ndcg) = rows
    figures.claim(
        "the first loss differs from a random start's",
        f"{first:.3f} and {random_first:.3f}",
        "different",
        abs(first - random_first) > 0.01,
    )
    figures.claim(
        f"NDCG@10 after {steps} steps, pretrained and random",
        f"{ndcg:.4f} and {random_ndcg:.4f}",
        "pretrained better",
        ndcg > random_ndcg,
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


def run(settings: Settings, prepared: Prepared, steps: int, work: Path) -> tuple[float, float, float, float]:
    """First loss and NDCG@10 as the weights come, last loss and NDCG@10 after so many steps."""
    stage = settings.train.stage1.model_copy(update={"steps": steps, "evaluate_every": 0})
    model = new_model(settings, "hllm", prepared)
    batches = Batches(
        prepared, stage.history_length, stage.batch_size, stage.negatives, settings.run.seed + 1
    )

    def ndcg() -> float:
        model.eval()
        with torch.no_grad():
            return validation_ndcg(
                model, prepared, settings.embed.max_history, settings.embed.tokens_per_batch
            )

    before = ndcg()
    trained = fit(
        model,
        batches,
        stage,
        seed=settings.run.seed,
        work=work,
        stopping=threading.Event(),
        log=lambda values, at: None,
    )
    return trained.first_loss, before, trained.last_loss, ndcg()


if __name__ == "__main__":
    main()
