"""SIGKILL and SIGTERM at any moment, the same command again, and the world of a run that nothing stopped."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.commands import Link, run
from tests.chaos.compare import View, differences, view
from tests.chaos.forkserver import Ended
from tests.chaos.points import Points
from tests.chaos.world import World

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
STOPPED = {"kill": (137,), "term": (143,)}
AT_A_WRITE = 0.6
"""Share of the tries that stop a command as it is about to write; the others stop it at any time."""
TWICE = 0.2
"""Share of the tries that stop the second run, too."""


@dataclass
class Reference:
    """What two uninterrupted runs leave, how long one takes, and at how many moments it writes."""

    views: tuple[View, View]
    seconds: float
    points: int
    growth: int
    """Bytes that it adds to the world."""


@dataclass
class Tries:
    """One world's commands and their references, made when they are first asked for."""

    world: World
    links: dict[str, Link]
    after: dict[str, View]
    """The view after each link, as the chain went by."""
    references: dict[str, Reference] = field(default_factory=dict)

    def reference(self, name: str) -> Reference:
        if name not in self.references:
            self.world.restore(name)
            before = _bytes(self.world.here)
            tally = self.world.folder / "points"
            ended = run(self.world, self.links[name], Points(self.world.here, tally))
            if ended.code not in self.links[name].codes:
                raise RuntimeError(f"{name}, uninterrupted, ended with {ended.code}: {ended.output[-2000:]}")
            again = self.world.forks.call(lambda: view(self.world))
            self.references[name] = Reference(
                (self.after[name], again),
                ended.seconds,
                int(tally.read_text()),
                max(0, _bytes(self.world.here) - before),
            )
        return self.references[name]

    def kill(self, name: str, how: str, seed: int) -> list[str]:
        """One try; what was wrong with it."""
        reference, link = self.reference(name), self.links[name]
        dice = random.Random(f"{self.world.kind} {name} {how} {seed}")
        self.world.restore(name)
        problems: list[str] = []
        story = []
        for _ in range(1 + (dice.random() < TWICE)):
            ended, told = self._stop(link, how, dice, reference)
            story.append(told)
            if ended.code not in (*STOPPED[how], *link.codes):
                problems.append(f"{told}: exit {ended.code}: {last_lines(ended)}")
        problems += mended(self, name)
        return [f"({'; '.join(story)})", *problems] if problems else []

    def _stop(self, link: Link, how: str, dice: random.Random, reference: Reference) -> tuple[Ended, str]:
        number = SIGNALS[how]
        if dice.random() < AT_A_WRITE and reference.points:
            at = dice.randint(1, reference.points)
            ended = run(self.world, link, Points(self.world.here, at=at, how=number))
            return ended, f"{number.name} at write {at} of {reference.points}"
        after = dice.uniform(0, reference.seconds)
        return run(self.world, link, after=after, how=number), f"{number.name} after {after:.2f} s"


def mended(tries: Tries, name: str) -> list[str]:
    """The same command again, undisturbed: what is different from a world in which nothing went wrong."""
    link, reference = tries.links[name], tries.reference(name)
    ended = run(tries.world, link)
    if ended.code not in link.codes:
        return [f"the same command again: exit {ended.code}: {last_lines(ended)}"]
    return differences(*reference.views, tries.world.forks.call(lambda: view(tries.world)))


def last_lines(ended: Ended) -> str:
    return " | ".join(ended.output.strip().splitlines()[-4:])[-600:]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
