"""What is tried: a pipeline's whole life, one link after another, and which of them in which world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.forkserver import Ended
from tests.chaos.points import Points
from tests.chaos.world import World


@dataclass(frozen=True)
class Link:
    """One command of the chain; `name` is also the state of the world before it."""

    name: str
    argv: tuple[str, ...]
    days: int = 0
    """How far ahead the command's clock is: old outputs are old."""
    before: Callable[[World], None] | None = None
    """What happens to the world first."""
    tried: bool = True
    codes: tuple[int, ...] = (0,)


def run(
    world: World,
    link: Link,
    points: Points | None = None,
    also: Callable[[], object] | None = None,
    **how: object,
) -> Ended:
    """The link's command in a child; `also` is called there first."""

    def prepare() -> None:
        hasten_leases()
        if link.days:
            ahead(link.days)
        if also:
            also()
        if points:
            points.install()

    ended: Ended = world.run(link.argv, prepare=prepare, **how)
    return ended


def hasten_leases() -> None:
    """A claim in S3 of a process that was killed is over after three seconds instead of sixty."""
    from hllm.work import lease

    lease.BEAT_SECONDS, lease.STALE_SECONDS = 0.5, 3.0


def ahead(days: int) -> None:
    """`hllm prune` of this process believes that so many days have passed."""
    from datetime import datetime, timedelta, tzinfo

    import hllm.prune

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            later = datetime.now(tz) + timedelta(days=days)
            return cls.fromtimestamp(later.timestamp(), tz)

    hllm.prune.datetime = Later  # type: ignore[misc]


def steps(extra: tuple[str, ...] = (), tried: bool = True, mark: str = "") -> list[Link]:
    """From the log to a registered version."""

    def link(name: str, *argv: str) -> Link:
        return Link(name + mark, (*argv, *extra), tried=tried)

    return [
        link("ingest", "ingest"),
        link("validate", "validate"),
        link("prepare", "prepare"),
        link("train-hllm-1", "train", "--stage", "1"),
        link("embed-hllm-1", "embed", "--stage", "1"),
        link("train-hllm-2", "train", "--stage", "2"),
        link("embed-hllm-3", "embed", "--stage", "3"),
        link("train-sasrec", "train", "--family", "sasrec"),
        link("embed-sasrec", "embed", "--family", "sasrec"),
        link("train-hstu", "train", "--family", "hstu"),
        link("embed-hstu", "embed", "--family", "hstu"),
        link("evaluate", "evaluate"),
        link("register", "register"),
    ]


def release(extra: tuple[str, ...] = (), version: int = 1, tried: bool = True, mark: str = "") -> list[Link]:
    """From a registered version to the champion."""
    which = ("--version", str(version))
    return [
        Link(f"publish{mark}", ("publish", *which, *extra), tried=tried),
        Link(f"verify{mark}", ("verify", *which, *extra), tried=tried),
        Link(f"promote{mark}", ("promote", *which, "--by", "chaos", "--note", "n", *extra), tried=tried),
    ]


def another(version: int) -> list[Link]:
    """A further version of the same data, released."""
    extra = ("--set", f"hllm.stage2.steps={version + 3}")
    again = ("train-hllm-2", "embed-hllm-3", "evaluate", "register")
    links = [each for each in steps(extra, tried=False, mark=f"-v{version}") if each.name.startswith(again)]
    return links + release(extra, version, tried=False, mark=f"-v{version}")


def chain(kind: str) -> list[Link]:
    """Of the world of this kind. What lies in files alone is tried in the local world only."""
    files = kind in ("local", "s3")
    found = [] if kind != "local" else [Link("first-of-all", ("ingest",))]
    found += steps(tried=files)
    if found[0].name == "first-of-all":
        found[1] = Link("ingest", ("ingest", "--force"))
    found += release()
    found += [
        Link("recommend", ("recommend", "--user", "u5"), tried=files),
        *another(2),
        Link("rollback", ("rollback", "--by", "chaos", "--note", "n")),
        *another(3),
        *another(4),
        Link("ingest-later", ("ingest",), before=a_day_later, tried=False),
        Link("validate-later", ("validate",), tried=False),
        Link("refresh-items", ("refresh", "items")),
        Link("refresh-users", ("refresh", "users")),
        Link("backfill", ("backfill", "--from", "2020-09-22", "--to", "2020-09-23")),
        Link("watch", ("watch",), codes=(0, 66)),
        Link("retire", ("retire", "--by", "chaos")),
    ]
    if files:
        found += [
            Link("ingest-last", ("ingest",), before=lambda world: world.grow(4), tried=False),
            Link("validate-last", ("validate",), tried=False),
            Link("prune", ("prune", "--keep-days", "1"), days=30),
        ]
    return found


def a_day_later(world: World) -> None:
    """The log has grown; in the catalogue one text has changed, and one item is new."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    world.grow(3)
    columns = parquet.read_table(world.catalogue).to_pydict()
    columns["title"][3] = "A new title"
    for name, value in (("item_id", "fresh item"), ("title", "Fresh"), ("genre", "heist")):
        columns[name].append(value)
    parquet.write_table(pa.table(columns), world.catalogue)
