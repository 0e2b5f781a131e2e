"""`hllm`: one command per step of the pipeline. The same argv runs by hand, in Airflow and in a pod."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

import hllm
from hllm import settings as settings_module
from hllm.errors import ConfigError, HLLMError, Terminated
from hllm.foreign_errors import as_ours
from hllm.models.family import Family, TrainedModel, families, family
from hllm.pipeline import execute, export_step
from hllm.settings import Settings
from hllm.work import launch
from hllm.work.ranks import told
from hllm.work.step import limit_threads
from hllm.work.termination import (
    interrupt,
    leave,
    printable,
    say,
    terminate,
    was_interrupted,
    was_terminated,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="HLLM_CONFIG", help="Settings file (TOML).")
]


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hllm {hllm.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    """HLLM: from an interaction log to vectors that a ranking model reads."""


Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="A.B=C", help="Override one setting; may be repeated."),
]
Force = Annotated[bool, typer.Option("--force", help="Run again even though the output exists.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Version = Annotated[
    str | None,
    typer.Option(
        "--version",
        envvar="HLLM_VERSION",
        help="Model version; the one these settings registered when left out.",
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        help=f"Model family: {', '.join(families())}. The settings' model.family when left out.",
    ),
]

By = Annotated[str, typer.Option("--by", envvar="HLLM_DECIDED_BY", help="Who decided.")]
Note = Annotated[str, typer.Option("--note", envvar="HLLM_DECISION_NOTE", help="Why.")]
At = Annotated[
    str,
    typer.Option("--at", envvar="HLLM_DECIDED_AT", help="When it was decided (ISO 8601); now when left out."),
]


@app.command()
def ingest(config: Config = None, set: Set = None, force: Force = False, debug: Debug = False) -> None:
    """Read the raw log and catalogue into two canonical tables."""
    _step("ingest", config, set, force, debug)


@app.command()
def validate(config: Config = None, set: Set = None, force: Force = False, debug: Debug = False) -> None:
    """Check both tables with Great Expectations; quarantine the rows that fail."""
    _step("validate", config, set, force, debug)


@app.command()
def prepare(config: Config = None, set: Set = None, force: Force = False, debug: Debug = False) -> None:
    """Number items and users, order and split histories, tokenise every item text once."""
    _step("prepare", config, set, force, debug)


@app.command()
def train(
    stage: Annotated[
        int, typer.Option(min=1, help="1: end to end. 2: the user model alone, from the item cache.")
    ] = 1,
    family: FamilyName = None,
    config: Config = None,
    set: Set = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Train one stage of one model family; continues from the last checkpoint."""
    with _command(debug):
        settings = settings_module.load(config, set or ())
        chosen = _family(family, settings)
        if stage > len(chosen.stages):
            known = ", ".join(str(number) for number in range(1, 1 + len(chosen.stages)))
            typer.echo(
                f"train: {chosen.name} has no stage {stage} (its stages: {known or 'none'}); nothing to do"
            )
            return
        _run(TrainedModel(chosen, stage).train_step, settings, force)


@app.command()
def embed(
    stage: Annotated[
        int,
        typer.Option(help="1: encode every item into the item cache. 3: freeze, export every item and user."),
    ] = 1,
    family: FamilyName = None,
    config: Config = None,
    set: Set = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Encode items, or export every item and user vector; continues at the next shard."""
    with _command(debug):
        settings = settings_module.load(config, set or ())
        chosen = _family(family, settings)
        if stage not in (1, 3):
            raise ConfigError(
                "embed knows stage 1 (item cache) and stage 3 (export)", where=f"--stage {stage}"
            )
        _run(TrainedModel(chosen, 1).embed_step if stage == 1 else export_step(chosen), settings, force)


@app.command()
def evaluate(config: Config = None, set: Set = None, force: Force = False, debug: Debug = False) -> None:
    """Rank the whole catalogue for every held-out event, for every model."""
    _step("evaluate", config, set, force, debug)


@app.command()
def rank(config: Config = None, set: Set = None, force: Force = False, debug: Debug = False) -> None:
    """Train a reference ranker with and without the vectors, from Feast, and say what they gain."""
    with _command(debug):
        settings = settings_module.load(config, set or ())
        if not settings.ranking.test_from:
            raise ConfigError(
                "names no day, so no ranker is trained",
                where="ranking.test_from",
                remedy="Set its days, as configs/experiments/movielens-100k-ranking.toml does.",
            )
        _run("rank", settings, force)


@app.command()
def register(config: Config = None, set: Set = None, debug: Debug = False) -> None:
    """Log the model to MLflow, pass the gate, write the report, set the alias `candidate`."""
    with _command(debug):
        from hllm.registry.announce import announcement
        from hllm.registry.register import register as act

        settings = settings_module.load(config, set or ())
        found = announcement(settings, act(settings).version)
        state = "is the champion already" if found["serves"] else f"gate {found['gate']}"
        leave(f"register: {found['model']} version {found['version']}, {state} -> {found['report']}", found)


@app.command()
def publish(
    version: Version = None,
    again: Annotated[
        str,
        typer.Option(
            "--again",
            metavar="VERSION",
            help="Write a published version (v7) once more: its registration, rows or files were lost.",
        ),
    ] = "",
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Write a version's user and item vectors to Feast, in views of their own."""
    with _command(debug):
        from hllm.features.publish import publish as act
        from hllm.features.publish import publish_again

        settings = settings_module.load(config, set or ())
        if again:
            publish_again(settings, again.removeprefix("v"))
        else:
            act(settings, version)


@app.command()
def verify(version: Version = None, config: Config = None, set: Set = None, debug: Debug = False) -> None:
    """Read a published version back from Feast and compare it with the export."""
    with _command(debug):
        from hllm.features.verify import verify as act

        act(settings_module.load(config, set or ()), version)


@app.command()
def promote(
    version: Version = None,
    by: By = "",
    note: Note = "",
    at: At = "",
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Move the alias `champion` to a version that has been published and verified."""
    with _command(debug):
        from hllm.registry.promote import promote as act

        act(settings_module.load(config, set or ()), version, by=by, note=note, at=at)


@app.command()
def reject(
    version: Version = None,
    by: By = "",
    note: Note = "",
    at: At = "",
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Record that a candidate was rejected, by whom and why; it loses the alias `candidate`."""
    with _command(debug):
        from hllm.registry.promote import reject as act

        act(settings_module.load(config, set or ()), version, by=by, note=note, at=at)


@app.command()
def rollback(
    to: Annotated[
        str | None,
        typer.Option("--to", help="Version to return to; the champion before this one when left out."),
    ] = None,
    by: By = "",
    note: Note = "",
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Move the alias `champion` back to an earlier, still published version."""
    with _command(debug):
        from hllm.registry.promote import rollback as act

        act(settings_module.load(config, set or ()), to, by=by, note=note)


@app.command()
def recommend(
    user: Annotated[str | None, typer.Option("--user", help="A user of the published version.")] = None,
    history: Annotated[
        str | None,
        typer.Option("--history", help="Item ids, oldest first, between commas; one with a comma in quotes."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="How many items.")] = 10,
    version: Annotated[
        str | None, typer.Option("--version", help="Model version; the one that serves when left out.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family", help="A family that needs no training (neighbours), on the prepared log alone."
        ),
    ] = None,
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Recommend items to a user, or after a history of item ids, with their titles."""
    with _command(debug):
        from hllm.recommend import recommend as act
        from hllm.recommend import recommend_untrained

        settings = settings_module.load(config, set or ())
        items = next(csv.reader([history], skipinitialspace=True)) if history is not None else None
        if family is not None:
            typer.echo(recommend_untrained(settings, family, user, items, count))
        else:
            typer.echo(act(settings, version, user, items, count))


@app.command()
def retire(
    by: By = "",
    note: Note = "",
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Remove what older versions have published; the champion and two before it stay."""
    with _command(debug):
        from hllm.features.retire import retire as act

        act(settings_module.load(config, set or ()), by=by, note=note)


@app.command()
def refresh(
    what: Annotated[
        Literal["users", "items"], typer.Argument(help="Users who were active, or texts that changed.")
    ],
    until: Annotated[
        str, typer.Option("--until", envvar="HLLM_UNTIL", help="As of when (ISO 8601); now when left out.")
    ] = "",
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Encode what changed with the serving model, into the views of its version."""
    with _command(debug):
        from hllm.features.refresh import refresh as act

        settings = settings_module.load(config, set or ())
        limit_threads(settings)
        act(settings, what, until=until)


@app.command()
def backfill(
    first: Annotated[str, typer.Option("--from", help="First day (UTC), like 2026-03-01.")],
    last: Annotated[str, typer.Option("--to", help="Last day (UTC).")],
    inside_training: Annotated[
        bool, typer.Option("--inside-training", help="Also days that the model was trained on: marked.")
    ] = False,
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Write the serving model's user vectors of past days to the offline store."""
    with _command(debug):
        from hllm.features.backfill import backfill as act

        settings = settings_module.load(config, set or ())
        limit_threads(settings)
        act(settings, first, last, inside_training=inside_training)


@app.command()
def watch(config: Config = None, set: Set = None, debug: Debug = False) -> None:
    """Look at the vectors that serve; fail with what to do when they are stale, missing or unsound."""
    with _command(debug):
        from hllm.features.watch import watch as act

        act(settings_module.load(config, set or ()))


@app.command()
def prune(
    keep_days: Annotated[
        int,
        typer.Option("--keep-days", min=1, max=36_500, help="Younger outputs stay, whatever they are of."),
    ] = 14,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    config: Config = None,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Remove old copies of the log and the catalogue that nothing needs any more."""
    with _command(debug):
        from hllm.prune import prune as act

        act(settings_module.load(config, set or ()), keep_days, dry_run)


@app.command()
def plan(config: Config = None, set: Set = None, debug: Debug = False) -> None:
    """Print the steps, what is already done, and where each output is."""
    with _command(debug):
        from hllm.plan import plan as act

        act(settings_module.load(config, set or ()))


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="Comparison file (TOML): models, seeds, budget.")],
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="A seed instead of the file's; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would run.")] = False,
    set: Set = None,
    debug: Debug = False,
) -> None:
    """Train several models under one budget and the same seeds; write a table and a page of them."""
    with _command(debug):
        from hllm.comparison.compare import compare as act

        act(file, tuple(set or ()), tuple(seed or ()), dry_run)


@app.command()
def doctor(config: Config = None, set: Set = None, debug: Debug = False) -> None:
    """Check this machine: packages, memory, disk, GPU, and whether MLflow, Feast and S3 answer."""
    with _command(debug):
        from hllm.doctor import doctor as act

        act(settings_module.load(config, set or ()))


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; ours are in hllm.work.progress
    bound_shape_caches()
    if len(sys.argv) > 1 and sys.argv[1] in ("train", "embed", "evaluate"):
        _suit_the_allocator()
    app()


def bound_shape_caches() -> None:
    """Keep oneDNN, and PyTorch's layer above it, from remembering 1,024 prepared operations each: one for
    every shape, half a megabyte apiece. Torch must not be imported yet.

    Packed batches hardly ever have the same number of tokens twice, so training kept hundreds of megabytes
    that nobody asked for again. 64 are enough for one step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _suit_the_allocator() -> None:
    """Start this process again with glibc told to keep freed tensors in one heap of huge pages.

    By itself it asks the kernel for every large tensor anew: page faults then cost up to a third of a
    training step.
    """
    wanted = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(256 << 20),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if sys.platform == "linux" and not any(name in os.environ for name in wanted):
        same = [sys.executable, *sys.orig_argv[1:]]  # with the interpreter's own options, -m and -c too
        os.execve(sys.executable, same, {**os.environ, **wanted})  # noqa: S606 - this very program again


def _step(name: str, config: Path | None, overrides: list[str] | None, force: bool, debug: bool) -> None:
    with _command(debug):
        _run(name, settings_module.load(config, overrides or ()), force)


def _run(name: str, settings: Settings, force: bool) -> None:
    launch.die_with_parent()
    outcome = execute(name, settings, force, argv=sys.argv[1:])
    if told() and ("HLLM_LAUNCHED" in os.environ or os.environ["RANK"] != "0"):
        return  # one of several processes: another says how it went
    manifest, where = outcome.manifest, f"{settings.run.root}/{name}/{outcome.manifest.key}"
    rows = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in manifest.rows.items())
    if outcome.reused:
        line = f"{name}: reused, nothing changed since {manifest.created_at} ({rows or 'done'}) -> {where}"
    else:
        line = f"{name}: done in {manifest.seconds:.1f} s ({rows or 'done'}) -> {where}"
    say(line)


def _family(name: str | None, settings: Settings) -> Family:
    chosen = name or settings.model.family
    if chosen not in families():
        raise ConfigError(
            f"is not a model family; there are {', '.join(families())}", where=f"--family {chosen}"
        )
    return family(chosen)


@contextlib.contextmanager
def _command(debug: bool) -> Iterator[None]:
    """Errors as a person reads them, and as exit codes that a scheduler acts on."""
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (SystemExit, typer.Exit):
        _end_if_terminated()
        raise
    except KeyboardInterrupt:
        _end_if_terminated()
        _say_last("interrupted; the same command continues")
        raise SystemExit(130) from None
    except BaseException as error:
        if isinstance(error, Terminated) or was_terminated():
            _end_terminated()
        if was_interrupted():
            _say_last("interrupted; the same command continues")
            raise SystemExit(130) from None
        if debug:
            raise
        ours = as_ours(error)
        if ours is None:
            ours = HLLMError(
                f"{type(error).__name__}: {error}",
                remedy="This is a bug. Run the same command with --debug for the traceback.",
            )
        _say_last(str(ours))
        raise SystemExit(ours.exit_code) from None
    _end_if_terminated()


def _end_if_terminated() -> None:
    """Whatever a library made of the interruption."""
    if was_terminated():
        _end_terminated()


def _end_terminated() -> NoReturn:
    _say_last("stopped by SIGTERM; the same command continues from the last checkpoint")
    raise SystemExit(Terminated.exit_code) from None


def _say_last(message: str) -> None:
    """To stderr, and its first line to where a scheduler looks for the reason of a failure."""
    message = printable(message)
    typer.echo(f"error: {message}", err=True)
    leave(message.splitlines()[0])


if __name__ == "__main__":
    main()
