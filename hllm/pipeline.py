"""The pipeline as data: every step, what it needs, what settings decide its output, and how one is executed.

`hllm plan`, the commands and the Airflow DAGs all read this file, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import hllm
from hllm.errors import ConfigError, DataError, InfraError
from hllm.models.family import Family, TrainedModel, families, family
from hllm.settings import Settings
from hllm.work import launch, ranks
from hllm.work.artifacts import (
    FORGOTTEN,
    MANIFEST,
    WORK,
    Manifest,
    Store,
    clear,
    digest_of,
    file_digests,
    file_schemas,
)
from hllm.work.costs import Meter
from hllm.work.step import Context, Outcome, Step, limit_threads, load_function, settings_of

PRUNED = ("ingest", "validate", "prepare")
"""Steps whose outputs `hllm prune` removes when nobody needs them any more."""


def trained_models(settings: Settings) -> list[TrainedModel]:
    """What is trained, in order: the stages of the main family, as many as `model.stages` says, then all of
    each baseline's."""
    found = []
    for name in dict.fromkeys((settings.model.family, *settings.model.baselines)):
        stages = range(1, 1 + len(family(name).stages))
        chosen = settings.model.stages if name == settings.model.family else 0
        found += [TrainedModel(family(name), stage) for stage in stages[: chosen or None]]
    return found


def candidate(settings: Settings) -> TrainedModel:
    """The model that is registered: the main family after its last stage."""
    return [each for each in trained_models(settings) if each.family.name == settings.model.family][-1]


def tokenizer_setting(settings: Settings) -> str:
    """The setting that names the backbone whose tokenizer reads the texts: that of the first trained family
    that reads any, or else of the first that there is, so that models which are compared share their data."""
    known = [*(each.family for each in trained_models(settings)), *families().values()]
    return next((f"{each.name}.{each.tokenizer}" for each in known if each.tokenizer), "")


def steps(settings: Settings) -> dict[str, Step]:
    """The steps up to the evaluation, in an order in which they can run. Registering and publishing
    act on services and are found in `hllm.registry` and `hllm.features`."""
    found = [
        Step(
            "ingest",
            ("ingest",),
            "raw log and catalogue -> two canonical tables",
            (),
            ("data",),
            "hllm.data.ingest:ingest",
            revision=2,  # the log keeps fractions of a second
        ),
        Step(
            "validate",
            ("validate",),
            "Great Expectations, quarantine",
            ("ingest",),
            ("validation", "run.name"),
            "hllm.data.validate:validate",
        ),
        Step(
            "prepare",
            ("prepare",),
            "ids, histories, token store",
            ("validate",),
            ("prepare", *filter(None, (tokenizer_setting(settings),))),
            "hllm.data.prepare:prepare",
            backbones=tuple(filter(None, (tokenizer_setting(settings),))),
        ),
    ]
    evaluated: list[str] = []
    for trained in trained_models(settings):
        family, first = trained.family, TrainedModel(trained.family, 1)
        stage, contract = family.stage_settings(settings, trained.stage), family.stages[trained.stage - 1]
        decides = family.key_settings(trained.stage)
        # Validation reads as far as inference does; models with positions at most as far as they learn.
        if stage.evaluate_every and not (
            family.bounded_history and settings.embed.max_history >= stage.history_length
        ):
            decides += ("embed.max_history",)
        if settings.train.share < 1:
            decides += ("train.share",)
        found.append(
            Step(
                trained.train_step,
                ("train", "--family", family.name, "--stage", str(trained.stage)),
                f"{family.name} stage {trained.stage}",
                ("prepare", *((first.train_step, first.embed_step) if contract.cached_items else ())),
                decides,
                "hllm.training.train:train",
                shared=True,
                revision=contract.revision,
                backbones=family.tower_settings(trained.stage),
            )
        )
        evaluated.append(trained.train_step)
        if not contract.cached_items:
            found.append(
                Step(
                    trained.embed_step,
                    ("embed", "--family", family.name, "--stage", str(trained.stage)),
                    f"{family.name}: every item encoded once",
                    ("prepare", trained.train_step),
                    ("embed.shard_items",),
                    "hllm.embedding.items:embed_items",
                    shared=True,
                )
            )
            evaluated.append(trained.embed_step)
    main = candidate(settings)
    first = TrainedModel(main.family, 1)
    found.append(
        Step(
            export_step(main.family),
            ("embed", "--family", main.family.name, "--stage", "3"),
            f"{main.family.name}: frozen; every item and user exported",
            tuple(dict.fromkeys(("prepare", first.train_step, first.embed_step, main.train_step))),
            ("embed.max_history", "embed.shard_users"),
            "hllm.embedding.export:export",
            shared=True,
        )
    )
    if settings.ranking.test_from:
        found.append(
            Step(
                "rank",
                ("rank",),
                "the reference ranker, with and without the vectors",
                ("prepare", first.embed_step, main.train_step),
                ("ranking", "evaluation", "run.seed", "embed.max_history"),
                "hllm.ranker.rank:rank",
            )
        )
    found.append(
        Step(
            "evaluate",
            ("evaluate",),
            "full ranking of every model",
            ("prepare", *evaluated),
            ("evaluation", "run.seed", "embed.max_history", "model.family"),
            "hllm.evaluation.evaluate:evaluate",
            shared=True,
        )
    )
    return {step.name: step for step in found}


def export_step(family: Family) -> str:
    """The step that writes every vector of a family out: its last."""
    return f"embed-{family.name}-3"


def keys(settings: Settings) -> dict[str, str]:
    """The output key of every step, computed without running anything."""
    from hllm.data.readers import source_fingerprints
    from hllm.models.common.backbone import fingerprint

    found: dict[str, str] = {}
    memory = Store(settings.run.root).local
    for step in steps(settings).values():
        found[step.name] = digest_of(
            {
                "step": step.name,
                "revision": step.revision,
                "settings": settings_of(step, settings),
                "needs": [found[need] for need in step.needs],
                "source": source_fingerprints(settings.data, memory) if step.name == "ingest" else None,
                "backbones": [fingerprint(settings.at(dotted)) for dotted in step.backbones],
            }
        )
    return found


def pipeline_key(keys: Mapping[str, str]) -> str:
    """Names one whole pipeline: same data, same settings, same key. The MLflow parent run carries it."""
    return digest_of(sorted(keys.items()))


def execute(name: str, settings: Settings, force: bool = False, argv: Sequence[str] | None = None) -> Outcome:
    """Run one step, or find that it has been done. `argv`: the command line that asked for it, with which
    several processes can be started.

    Raises:
        ConfigError: there is no such step with these settings.
        DataError: an input is not finished.
    """
    found = steps(settings)
    if name not in found:
        raise ConfigError(f"no step {name} with these settings", remedy=f"Steps: {', '.join(found)}.")
    step, all_keys = found[name], keys(settings)
    store, key = Store(settings.run.root), all_keys[name]
    done = None if force else store.whole(name, key)
    if done:
        if name.startswith("train-"):  # the only steps that keep anything in S3 before they are finished
            store.tidy(name, key)
        _use(store, name, key)
        return Outcome(done, reused=True)
    for need in step.needs:
        if store.manifest(need, all_keys[need]) is None:
            raise DataError(
                f"needs the output of {need}, which has not run with these settings",
                where=name,
                remedy=f"Run `hllm {' '.join(found[need].argv)}` with the same settings first; "
                "`hllm plan` shows what is missing.",
            )
        _use(store, need, all_keys[need])
    limit_threads(settings)
    count = launch.wanted(settings) if step.shared and argv is not None else 0
    if argv is not None and count:
        launch.run(count, argv, settings.runner)
        return Outcome(_finished(store, name, key), reused=False)
    with ranks.joined(alone_too=name.startswith("train-") and settings.train.zero > 0) as place:
        if place.first:
            outcome = _lead(step, settings, store, all_keys, force)
        else:
            inputs = _fetch(step, store, all_keys)
            context = Context(settings, step, key, inputs, store.folder(name, key), store)
            load_function(step.run)(context)
        ranks.barrier()  # until the first has written the manifest
        return outcome if place.first else Outcome(_finished(store, name, key), reused=False)


def _lead(step: Step, settings: Settings, store: Store, all_keys: Mapping[str, str], force: bool) -> Outcome:
    """The only process of a step, or the first of several: it alone locks, records and finishes."""
    from hllm.work.tracking import child_run

    name, key = step.name, all_keys[step.name]
    with store.lock(name, key):
        if not force and (done := store.whole(name, key)):  # while this one waited for the lock
            return _reused_by_all(done, store)
        inputs = _fetch(step, store, all_keys)
        output = store.folder(name, key)
        if force or (output / FORGOTTEN).exists():  # half removed: what is left is no beginning
            store.forget(name, key)
        (output / MANIFEST).unlink(missing_ok=True)  # in S3 it may have been removed from elsewhere
        output.mkdir(parents=True, exist_ok=True)
        context = Context(settings, step, key, inputs, output, store)
        meter = Meter()
        with child_run(settings, pipeline_key(all_keys), name, settings_of(step, settings)) as tracker:
            context.tracker = tracker
            tracker.belongs_to(all_keys)
            load_function(step.run)(context)
            clear(output / WORK)
            files = file_digests(output, exclude=(WORK,))
            manifest = Manifest(
                step=name,
                key=key,
                settings_digest=digest_of(settings_of(step, settings)),
                code_version=hllm.__version__,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=meter.seconds,
                digest=digest_of(files),
                rows=context.rows,
                facts=context.facts,
                files=files,
                schema=file_schemas(output, files),
                usage=meter.usage(),
            )
            tracker.finish(manifest)
        store.finish(manifest, context.carried)
        store.clear_work(name, key)
    return Outcome(manifest, reused=False)


def _reused_by_all(done: Manifest, store: Store) -> Outcome:
    """What another process has finished meanwhile. Several processes are working at it already: they end, and
    the next try finds it."""
    if ranks.place().size > 1:
        raise InfraError(
            "another process has finished this output meanwhile", where=store.location(done.step, done.key)
        )
    _use(store, done.step, done.key)
    return Outcome(done, reused=True)


def _use(store: Store, name: str, key: str) -> None:
    """A pipeline goes on from this output. MLflow does not know so before a step runs: steps may wait, and
    inputs take a while to arrive."""
    if name in PRUNED:
        store.use(name, key)


def _fetch(step: Step, store: Store, all_keys: Mapping[str, str]) -> dict[str, Path]:
    """The inputs as local folders. One process of each machine downloads them, the others find them there."""
    for turn in (True, False):
        if turn == (ranks.place().local_rank == 0):
            inputs = {need: store.fetch(need, all_keys[need]) for need in step.needs}
        ranks.barrier()
    return inputs


def _finished(store: Store, name: str, key: str) -> Manifest:
    found = store.manifest(name, key)
    if found is None:
        raise ConfigError(
            "the first process has finished the step, and its output is not here",
            where=store.location(name, key),
            remedy="Several machines need a run.root that all of them see: s3:// or a shared folder.",
        )
    return found


