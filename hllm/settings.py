"""Every setting, in one frozen tree read from one TOML file.

Order of precedence, last wins: the defaults below, the TOML file, the environment
(`HLLM__TRAIN__STAGE1__BATCH_SIZE=64`), `--set train.stage1.batch_size=64`.
Unknown keys are errors. `Settings.model_json_schema()` also feeds the trigger form in Airflow.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hllm.errors import ConfigError

ENV_PREFIX = "HLLM__"


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Run(Section):
    name: str = "default"
    """Names the pipeline: the MLflow experiment, and the runs that volume and freshness are compared with."""
    root: str = "runs/default"
    """Where every step writes: a folder or `s3://bucket/prefix`."""
    seed: int = 17
    """Seeds weights, batches, negatives and bootstrap samples."""
    threads: int = Field(0, ge=0)
    """CPU threads for PyTorch and DuckDB, in each process; 0 means every core."""
    processes: int = Field(0, ge=0)
    """Processes of `train`, `embed` and `evaluate` on each machine; 0 means one for each GPU, or one."""


class Columns(Section):
    user_id: str = "user_id"
    """Column of the interactions file that names the user."""
    item_id: str = "item_id"
    """Column of both files that names the item."""
    timestamp: str = "timestamp"
    """Column of the interactions file with the time of the event. Empty: the file is ordered and has no
    times; row n gets `data.order_starts` + n seconds."""
    label: str = ""
    """Column with 0/1 labels; empty when there is none."""
    event: str = ""
    """Column with the kind of event (view, buy, ...); empty when there is none."""
    created_at: str = ""
    """Column of the items file with the item's creation time; empty when there is none."""
    texts: tuple[str, ...] = ("title",)
    """Text columns of the items file, in the order in which the Item LLM reads them."""


class Data(Section):
    source: Literal["movielens", "amazon", "table"] = "table"
    """`movielens`: ml-100k atomic files. `amazon`: `NAME.inter.json` + `NAME.item.json`, order only.
    `table`: Parquet or CSV with the names in `data.columns`."""
    path: str = ""
    """Folder (or s3://) of a `movielens` or `amazon` source. Empty, for movielens: the copy inside the
    installed recbole wheel."""
    interactions: str = ""
    """Interactions file of a `table` source: local path or s3://, .parquet or .csv."""
    items: str = ""
    """Items file of a `table` source: local path or s3://, .parquet or .csv."""
    columns: Columns = Columns()
    """How the columns of a `table` source are called."""
    timestamp_unit: Literal["s", "ms", "us", "iso"] = "s"
    """Unit of the source's timestamps: seconds, milliseconds, microseconds since 1970, or ISO 8601 text (UTC
    when it names no zone)."""
    order_starts: int = 1_000_000_000
    """Sources without times: the n-th event of a user happens at this second + n."""
    positive_rating: float = 4.0
    """Ratings of at least this much get label 1, others 0 (movielens)."""
    batch_rows: int = Field(65_536, ge=1)
    """Rows read at a time: bounds memory, whatever the size of the log."""


class Validation(Section):
    not_before: str = "1990-01-01"
    """Events before this day (UTC) are quarantined."""
    max_future_hours: float = Field(0.0, ge=0)
    """How far in the future an event may lie before it is quarantined (clock skew)."""
    max_text_chars: int = Field(50_000, ge=1)
    """Items with a longer text are quarantined: it is nearly always a page scraped by mistake."""
    max_quarantined: float = Field(0.01, ge=0, le=1)
    """The largest share of rows of a table that may be quarantined before the step fails, for each reason not
    named below."""
    max_unknown_items: float = Field(0.001, ge=0, le=1)
    """The largest share of interactions whose item the catalogue lacks."""
    max_duplicates: float = Field(0.01, ge=0, le=1)
    """The largest share of events that repeat an earlier event (same user, item and second)."""
    max_empty_texts: float = Field(0.01, ge=0, le=1)
    """The largest share of items without any text."""
    min_rows_vs_previous: float = Field(0.5, ge=0)
    """A log with less than this share of the previous run's rows fails: half a log is worse than none."""
    max_days_stale: float = Field(0.0, ge=0)
    """Fail when the newest event is older than this many days; 0 turns the check off (historic data)."""
    max_days_behind_previous: float = Field(0.0, ge=0)
    """How many days older than the previous run's newest event the newest event may be. The same data again
    passes; a log without times is not asked."""


class Prepare(Section):
    k_core: int = Field(0, ge=0)
    """Drop users and items with fewer events than this, repeatedly until all have it; 0 keeps everything."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """`leave_one_out`: each user's last event is test, the one before validation.
    `temporal`: events from `valid_from` on are validation, from `test_from` on test."""
    valid_from: str = ""
    """First day of the validation period (temporal split), e.g. 1998-03-01."""
    test_from: str = ""
    """First day of the test period (temporal split)."""
    prompt: str = "Compress the following item information into an embedding: "
    """Fixed text before every item's fields."""
    fields: tuple[str, ...] = ()
    """Text fields that the Item LLM reads, in this order; empty: all of the catalogue, in its order."""
    field_template: str = "{name}: {value}"
    """How one text field is written."""
    field_separator: str = "\n"
    """What stands between two text fields."""
    max_tokens: int = Field(256, ge=4)
    """Tokens kept of an item, prompt included, [ITEM] not included."""


class Decoder(Section):
    backbone: str = ""
    """A local folder, a hub name, or a .gguf file that `transformers` loads as a decoder (the Item tower also
    takes BERT and what has its shape); `package:NAME/FILE` finds a file or folder inside an installed Python
    package. Empty: the small random decoder given by width, heads and layers."""
    pretrained: bool = True
    """Load the backbone's weights; false keeps its shape and starts at random."""
    frozen: bool = False
    """Leave this tower as it starts (table 4 of the HLLM paper): none of its weights is trained. What a
    frozen Item LLM makes of a text is computed once; the layer of `model.whiten` after it is trained."""
    lora_rank: int = Field(0, ge=0)
    """Train low-rank adapters of this rank beside every linear layer instead of the tower's own weights
    (LoRA); 0 trains the weights. What is saved is merged: loading and serving know nothing of adapters."""
    layers: int = Field(0, ge=0)
    """Keep only the first layers of the backbone; 0 keeps all."""
    width: int = Field(64, ge=2)
    """Vector width of the random decoder when no backbone is named."""
    heads: int = Field(2, ge=1)
    """Attention heads of the random decoder when no backbone is named."""


class UserFeatures(Section):
    time: Literal["", "year", "month", "day", "hour", "minute", "second"] = ""
    """How exactly the User LLM is told when an event happened (UTC): the parts down to this one; empty: not
    at all."""
    time_width: int = Field(512, ge=1)
    """Width of the embedding of each part of a time."""
    item_id: bool = False
    """Also tell the User LLM which item an event was, by a learned embedding of its own. Items that were not
    in the training catalogue have none."""


class IdModel(Section):
    width: int = Field(64, ge=2)
    """Width of the item embeddings and of every layer."""
    layers: int = Field(2, ge=1)
    """Self-attention blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on embeddings, attention and feed-forward."""


class Model(Section):
    family: Literal["hllm", "sasrec", "hstu"] = "hllm"
    """The family that is registered and published."""
    stages: int = Field(0, ge=0)
    """How many of the family's stages are trained, its first ones; 0: all. 1 of hllm is the paper's own
    comparison: both LLMs end to end, nothing after it."""
    item_llm: Decoder = Decoder()
    """Reads an item's text into one vector."""
    user_llm: Decoder = Decoder()
    """Reads item vectors into the next interest."""
    user_features: UserFeatures = UserFeatures()
    """What the User LLM reads of an event beside its item's vector; targets stay pure item vectors."""
    objective: Literal["generative", "early_fusion", "late_fusion"] = "generative"
    """What the family hllm learns. `generative`: which item comes next. `early_fusion` and `late_fusion`
    learn beside it whether the user likes a given item, from the log's labels (discriminative
    recommendation): early shows the candidate to the User LLM; late compares it with a user vector that
    serves all candidates."""
    generative_weight: float = Field(1.0, ge=0)
    """lambda in L_dis = lambda L_gen + L_cls, for the two discriminative objectives."""
    sasrec: IdModel = IdModel()
    """SASRec: self-attention over item IDs."""
    hstu: IdModel = IdModel()
    """HSTU: attention without softmax over item IDs, biased by position and time."""
    baselines: tuple[Literal["sasrec", "hstu"], ...] = ("sasrec",)
    """ID-based families that are trained beside `family`, on the same split, for comparison; most-popular is
    always compared."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the User LLM while it is trained: on its inputs and on what each layer adds (hllm; not in
    the paper). Small logs need it as much as ID-based models do."""
    temperature: float = Field(0.07, gt=0)
    """Initial temperature of the contrastive loss; learned, its inverse clamped to [1, 100]."""
    item_vector: Literal["item_token", "mean"] = "item_token"
    """What of the Item LLM's last layer is the item: its state at the learned [ITEM] vector after the text,
    or the mean over the text. A model cut to few layers has hardly begun to gather the text in one place:
    take the mean there."""
    whiten: bool = False
    """Start the item vectors from the whitening of the pretrained ones (a trained linear layer after the Item
    LLM, not in the paper); false takes the hidden state itself."""


class Stage(Section):
    history_length: int = Field(50, ge=2)
    """Events in one training window."""
    batch_size: int = Field(32, ge=1)
    """Windows per step."""
    negatives: int = Field(512, ge=1)
    """Items drawn uniformly from the catalogue, shared by the batch; at least the catalogue's size means all
    of it."""
    epochs: float = Field(1.0, gt=0)
    """Passes over all windows; ignored when `steps` is given."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 derives them from `epochs`."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    item_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the item side (stage 1); 0 takes `lr`."""
    words_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the Item LLM's word embeddings (stage 1); 0 takes `item_lr`."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with rising learning rate; a cosine to a tenth follows."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay on matrices (never on norms, biases and scalars)."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between looks at the validation events (the best weights are kept); 0 keeps the last weights."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Minutes between checkpoints; SIGTERM writes one too. With outputs in S3 they go there as well."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that are kept: the newest, and those before it in case it turns out to be damaged."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a step's items and windows pass the models, one after another, so that less memory holds
    the same batch. Loss and gradients are those of the whole: all parts share the negatives. The items are
    read twice for it."""
    gradient_checkpointing: bool = False
    """Compute the layers of both LLMs again in the backward pass instead of remembering what was inside
    them: less memory, a third more work."""
    compile: bool = False
    """Compile the layers of both LLMs by `torch.compile`: the first steps take minutes, the others less."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass (weights and loss stay fp32); `auto`: bf16 where the
    processor has it."""


class Train(Section):
    share: float = Field(1.0, gt=0, le=1)
    """Share of the users whose events train, drawn at random (`run.seed`); everybody's held-out events are
    ranked all the same. For data scaling."""
    zero: Literal[0, 1, 2, 3] = 0
    """How much of a training every process holds only a share of, by DeepSpeed's ZeRO: nothing (0: plain data
    parallelism), moments (1), gradients too (2), weights too (3). The results are the same."""
    stage1: Stage = Stage(history_length=10, batch_size=32)
    """End to end: both LLMs, short histories."""
    stage2: Stage = Stage(history_length=200, batch_size=32)
    """The User LLM alone over cached item vectors, long histories."""
    sasrec: Stage = Stage(history_length=200, batch_size=128, epochs=50, lr=1e-3)
    """SASRec, trained in one stage."""
    hstu: Stage = Stage(history_length=200, batch_size=128, epochs=50, lr=1e-3)
    """HSTU, trained in one stage."""


class Embed(Section):
    tokens_per_batch: int = Field(8192, ge=1)
    """Item tokens encoded at a time."""
    shard_items: int = Field(50_000, ge=1)
    """Items per shard of the item cache: a killed encoding continues at the next shard."""
    users_per_batch: int = Field(256, ge=1)
    """Users encoded at a time."""
    shard_users: int = Field(100_000, ge=1)
    """Users per exported file."""
    max_history: int = Field(200, ge=1)
    """The most recent events that the user model reads at inference."""


class Evaluation(Section):
    cutoffs: tuple[int, ...] = (5, 10, 50, 200)
    """K of Recall@K and NDCG@K."""
    filter_history: bool = True
    """Whether the headline numbers leave out items the user already has; both are always reported."""
    cold_item_events: int = Field(0, ge=0)
    """Items with at most this many training events are cold."""
    long_tail_item_events: int = Field(29, ge=0)
    """Items with at most this many (and more than cold) are long-tail."""
    cold_user_events: int = Field(5, ge=0)
    """Users with at most this many training events are cold."""
    long_tail_user_events: int = Field(35, ge=0)
    """Users with at most this many (and more than cold) are long-tail."""
    bootstrap: int = Field(1000, ge=10)
    """Resamples of the users behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the intervals."""
    example_users: int = Field(10, ge=0)
    """Users whose recommendations the report shows."""


class Ranking(Section):
    valid_from: str = ""
    """First day of the impressions that choose the reference ranker's best epoch; those from
    `prepare.test_from` to here train it."""
    test_from: str = ""
    """First day of the impressions that test it, until the log's end. Empty: no ranker is trained. The split
    must be temporal."""
    refresh_hours: float = Field(24.0, gt=0)
    """Hours between two refreshes of user vectors and counts; each knows the events before it."""
    lag_minutes: float = Field(0.0, ge=0)
    """Minutes from a refresh to the moment its features can be read."""
    seeds: int = Field(5, ge=1)
    """Rankers trained of each variant; figures are means over them."""
    id_width: int = Field(8, ge=1)
    """Width of the embeddings of user ids, item ids and categories."""
    vector_width: int = Field(8, ge=1)
    """Width of what the ranker makes of each vector."""
    hidden: int = Field(32, ge=1)
    """Width of the last layers of the ranker and of the auxiliary network."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout between layers and on the vectors."""
    batch_size: int = Field(256, ge=1)
    """Impressions per step."""
    epochs: int = Field(30, ge=1)
    """Most passes over the training impressions."""
    patience: int = Field(5, ge=1)
    """Passes without a better validation AUC before training ends; the best weights are kept."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate (Adam)."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW weight decay."""


class Gate(Section):
    metric: str = "ndcg@10"
    """The metric the gate looks at, on the held-out test events: `ndcg@K` or `recall@K` of the full ranking,
    or for a discriminative objective `auc`, `uauc` or `wuauc` of the labelled ones."""
    min_vs_popular: float = 1.0
    """The candidate's metric must exceed this multiple of most-popular's."""
    min_vs_sasrec: float = 0.0
    """... of SASRec's; 0 reports the comparison without failing on it."""
    min_vs_champion: float = 0.98
    """... of the champion's on the same events, when there is a champion."""


class Mlflow(Section):
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    """MLflow's store or server; the variable MLFLOW_TRACKING_URI wins when set."""
    artifact_root: str = "runs/mlflow-artifacts"
    """Where a new experiment keeps its files: a folder or s3:// (a server may decide for itself)."""
    model_name: str = "hllm"
    """The registered model's name."""
    keep_system_metrics: bool = True
    """Sample CPU, memory and GPU of every step."""


class Feast(Section):
    repo: str = "feature_repo"
    """Folder of the Feast repository."""
    project: str = "hllm"
    """Feast project."""
    registry: str = "runs/feast/registry.db"
    """Registry: a file, s3:// or a SQL URL (postgresql+psycopg://...)."""
    online: Literal["sqlite", "redis", "postgres"] = "sqlite"
    """Online store."""
    online_url: str = "runs/feast/online.db"
    """SQLite file, `host:port` of Redis, or `host:port/database` of Postgres; the password comes from
    HLLM_FEAST_PASSWORD."""
    offline: Literal["file", "postgres"] = "file"
    """Offline store."""
    offline_path: str = "runs/feast/offline"
    """Folder (or s3://) of the published Parquet files; `host:port/database` for Postgres."""
    write_batch_rows: int = Field(5_000, ge=1)
    """Rows per write to the online store."""
    publication_lag_minutes: float = Field(60.0, ge=0)
    """How long after the end of a day its vectors count as readable in a back-fill: what your daily refresh
    takes."""
    verify_sample: int = Field(5_000, ge=1)
    """Users and items whose online vectors are compared bit by bit before promotion: all up to so many,
    random ones of more. 5,000 take about five seconds."""


class Watch(Section):
    sample: int = Field(1_000, ge=10)
    """Users and items that are read, each at random."""
    active_days: float = Field(28.0, gt=0)
    """Users with an event in so many days before the newest one count as active."""
    max_user_hours: float = Field(36.0, gt=0)
    """Hours since the user vectors were brought up to date."""
    max_item_hours: float = Field(48.0, gt=0)
    """Hours since the item vectors were."""
    min_user_coverage: float = Field(0.99, ge=0, le=1)
    """The least share of active users with a vector."""
    min_item_coverage: float = Field(0.99, ge=0, le=1)
    """The least share of the catalogue's items with a vector."""
    max_null_rate: float = Field(0.0, ge=0, le=1)
    """The largest share of published ids that read as null."""
    max_norm_drift: float = Field(0.001, ge=0)
    """How far from 1 the length of any vector may be."""
    min_agreement: float = Field(0.3, ge=-1, le=1)
    """The least correlation between this and the previous version of how alike items are to each other.
    (The cosine of an item's two vectors is shown, but has no limit: two versions are two spaces.)"""
    max_hours_unfinished: float = Field(6.0, gt=0)
    """Hours after which work that was begun and not finished counts as left over."""


class Release(Section):
    approve_automatically: bool = False
    """Answer Airflow's approval request at once, in the name `approved_by`. For demonstrations: a person
    should decide."""
    approved_by: str = "automatic"
    """The name an automatic approval is recorded under."""
    timeout_hours: float = Field(72.0, gt=0)
    """How long a candidate waits for its decision."""


QUANTITY = r"^([0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$"


class Pod(Section):
    image: str = Field("hllm:0.1.0", min_length=1)
    """Container image with `hllm` in it; pin what you built by `@sha256:...`."""
    cpu: str = Field("2", pattern=QUANTITY, min_length=1)
    """Cores that are kept free for the step, as Kubernetes writes them (`2`, `500m`)."""
    cpu_limit: str = Field("4", pattern=QUANTITY)
    """Cores it may use when nobody else wants them; empty: as many as the node has (a namespace with a quota
    on limits refuses that)."""
    memory: str = Field("8Gi", pattern=QUANTITY, min_length=1)
    """Memory, asked for and limit at once (`8Gi`): a step that needs more is killed, and its task says so."""
    disk: str = Field("20Gi", pattern=QUANTITY)
    """Room on the node's disk under /work and /tmp, asked for and limit at once; empty: whatever there is."""
    gpus: int = Field(0, ge=0)
    """How many `nvidia.com/gpu`. With any, /dev/shm is memory, and nodes with the taint of that name are
    tolerated (with a `template`, that says what is)."""
    nodes: int = Field(1, ge=1)
    """Pods that work together on one step (`train`, `embed` or `evaluate`), each with all of the above: a
    JobSet, which the cluster must know."""
    queue: str = ""
    """Kueue's LocalQueue that admits the pod; empty: no queue."""
    template: str = ""
    """YAML file (kind Pod) with what else this cluster wants: tolerations, node affinity, more volumes. Where
    both say something, the rest of this section wins. Airflow's workers read it."""


class Runner(Section):
    kind: Literal["local", "kubernetes"] = "local"
    """How Airflow starts a step: `local`, a process on the machine of its worker, or `kubernetes`, a pod."""
    parallel_steps: int = Field(1, ge=1)
    """Steps of one pipeline that may run at the same time; each uses `run.threads`."""
    retries: int = Field(1, ge=0)
    """Retries of a step that failed with InfraError (75) or was terminated."""
    namespace: str = Field("hllm", min_length=1)
    """Kubernetes namespace of the steps' pods."""
    pod: Pod = Pod()
    """What the pod of every step asks for."""
    steps: dict[str, Pod] = {}
    """Where one step's pod differs, by the name of its task (`[runner.steps.train-hllm-1]`, `gpus = 1`); what
    is left out is as in `runner.pod`."""
    queue_hours: float = Field(24.0, gt=0)
    """How long a pod may wait for room (a GPU, its turn in the queue) before its task fails."""
    start_minutes: float = Field(20.0, gt=0)
    """How long a pod that has its node may take to start, pulling its image included."""
    grace_seconds: int = Field(300, ge=1)
    """Seconds from SIGTERM to SIGKILL: time for one unit of work and a checkpoint."""
    log_seconds: int = Field(15, ge=1)
    """Seconds between looks at a pod's output, which then appears in the task's log."""

    def pod_of(self, step: str) -> Pod:
        """What the pod of one step asks for: `pod`, except for what `steps` says of it."""
        own = self.steps.get(step)
        return self.pod.model_copy(update=own.model_dump(exclude_unset=True)) if own else self.pod


class Report(Section):
    price_per_hour: float = Field(0.10, ge=0)
    """What an hour of the machine costs, for the cost of each step (0.10 is about two cloud CPU cores); 0
    leaves it out."""
    price_per_gpu_hour: float = Field(0.0, ge=0)
    """What an hour of one GPU costs, on top of `price_per_hour`, from when a step has it until it gives it
    back."""
    currency: str = "USD"
    """Currency of both prices."""


class Settings(Section):
    run: Run = Run()
    data: Data = Data()
    validation: Validation = Validation()
    prepare: Prepare = Prepare()
    model: Model = Model()
    train: Train = Train()
    embed: Embed = Embed()
    evaluation: Evaluation = Evaluation()
    ranking: Ranking = Ranking()
    gate: Gate = Gate()
    report: Report = Report()
    mlflow: Mlflow = Mlflow()
    feast: Feast = Feast()
    watch: Watch = Watch()
    release: Release = Release()
    runner: Runner = Runner()

    def at(self, dotted: str) -> Any:
        """The value or section at `a.b.c`."""
        value: Any = self
        for part in dotted.split("."):
            value = getattr(value, part)
        return value


def load(
    path: str | Path | None, overrides: Iterable[str] = (), environ: Mapping[str, str] = os.environ
) -> Settings:
    """Settings from a TOML file, the environment and `a.b=c` overrides.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (with the nearest key), a value
            does not fit.
    """
    where = str(path) if path else "settings"
    tree = read_toml(Path(path)) if path else {}
    sources = {}  # dotted key -> where the user typed it
    for key, value in environ.items():
        if key.startswith(ENV_PREFIX):
            dotted = key.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _put(tree, dotted, value, key)
            sources[dotted] = key
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals:
            raise ConfigError("is not of the form section.key=value", where=f"--set {override}")
        _put(tree, dotted.strip(), value, f"--set {override}")
        sources[dotted.strip()] = f"--set {override}"
    _refuse_unknown(tree, Settings, "", where, sources)
    try:
        return Settings.model_validate(_merge(Settings().model_dump(), tree))
    except ValidationError as error:
        first = error.errors()[0]
        dotted = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{dotted}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}",
            where=sources.get(dotted, where),
            remedy=f"{dotted}: {describe(dotted)}",
        ) from None


def describe(dotted: str) -> str:
    """The docstring of one setting."""
    section, _, name = dotted.rpartition(".")
    model = _section_at(section)
    field = model.model_fields.get(name) if model else None
    return " ".join((field.description or "").split()) if field else ""


def _merge(defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A partly written section keeps the section's own defaults (stage 1 and stage 2 differ)."""
    merged = dict(defaults)
    for key, value in given.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "no such settings file", where=path, remedy=f"Looked in {path.resolve()}."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not valid TOML: {error}", where=path) from None


def _put(tree: dict[str, Any], dotted: str, text: str, source: str) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{parent} is a value, not a section", where=source)
    try:
        tree[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        tree[last] = text


def _refuse_unknown(
    tree: Mapping[str, Any], model: type[Section], prefix: str, where: str, sources: Mapping[str, str]
) -> None:
    for key, value in tree.items():
        dotted = prefix + key
        if key not in model.model_fields:
            near = _nearest(dotted)
            typed = next((source for path, source in sources.items() if path.startswith(dotted)), where)
            raise ConfigError(
                f"{dotted} is not a setting." + (f" Did you mean {near}?" if near else ""),
                where=typed,
                remedy=f"Known here: {', '.join(prefix + name for name in model.model_fields)}.",
            )
        section = _section_type(model, key)
        if section and isinstance(value, Mapping):
            _refuse_unknown(value, section, dotted + ".", where, sources)


def _nearest(dotted: str) -> str:
    """The setting that was probably meant. Its own name decides, then whether it is in or below the section
    that was typed (`train.batchsize` is `train.stage1.batch_size`)."""
    section, _, typed = dotted.rpartition(".")

    def likeness(key: str) -> float:
        parent, _, name = key.rpartition(".")
        nearby = (section == parent) + (f"{parent}.".startswith(f"{section}."))
        alike = difflib.SequenceMatcher(None, typed, name).ratio()
        return alike + 0.1 * nearby if alike >= 0.6 else 0.0

    best = max(_all_keys(Settings), key=likeness)
    return best if likeness(best) else ""


def _section_type(model: type[Section], name: str) -> type[Section] | None:
    annotation = typing.get_type_hints(model)[name]
    if isinstance(annotation, types.GenericAlias):
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _section_at(dotted: str) -> type[Section] | None:
    model: type[Section] | None = Settings
    for part in filter(None, dotted.split(".")):
        model = _section_type(model, part) if model and part in model.model_fields else None
    return model


def _all_keys(model: type[Section], prefix: str = "") -> Iterable[str]:
    for name in model.model_fields:
        yield prefix + name
        section = _section_type(model, name)
        if section:
            yield from _all_keys(section, prefix + name + ".")
