"""Builds a world once, tries its commands, counts."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import disks, rot, stores
from tests.chaos.commands import Link, chain, run
from tests.chaos.compare import View, view
from tests.chaos.forkserver import ForkServer
from tests.chaos.kills import Tries
from tests.chaos.world import World


class Suite:
    """`tried` and `passed` by world, command and kind."""

    def __init__(self, options: argparse.Namespace, forks: ForkServer) -> None:
        self.options, self.forks = options, forks
        self.tried: Counter[tuple[str, str, str]] = Counter()
        self.passed: Counter[tuple[str, str, str]] = Counter()
        self.began = time.monotonic()
        self.mounts = bool(set(options.kinds) & set(disks.KINDS)) and disks.possible()

    def go(self, kind: str, folder: Path, stack: ExitStack) -> None:
        world = World(kind, folder, self.forks, stack)
        links, after = self._build(world)
        tries = Tries(world, links, after)
        for how in self.options.kinds:
            if how in disks.KINDS and kind == "local" and not (self.mounts or self._no_mounts()):
                continue
            self._try_all(tries, how)

    def _no_mounts(self) -> bool:
        say("disks that are full, read-only or another user's: left out, this process may not mount")
        return False

    def _build(self, world: World) -> tuple[dict[str, Link], dict[str, View]]:
        """The whole life of the world, uninterrupted; a copy before each command that is tried."""
        began, links, after = time.monotonic(), {}, {}
        for link in chain(world.kind):
            if link.before:
                self.forks.call(lambda change=link.before: change(world))
            wanted = link.tried and (not self.options.only or link.name in self.options.only)
            if wanted:
                world.save(link.name)
            ended = run(world, link)
            if ended.code not in link.codes:
                raise SystemExit(f"{world.kind} {link.name} ended with {ended.code}:\n{ended.output[-3000:]}")
            self.forks.learn()
            if wanted:
                links[link.name], after[link.name] = link, self.forks.call(lambda: view(world))
            if link.name == self.options.until:
                break
        say(f"{world.kind}: the world stands after {time.monotonic() - began:.0f} s, {len(links)} commands")
        return links, after

    def _try_all(self, tries: Tries, how: str) -> None:
        """One command after another, each with the next seed, until there are enough."""
        kind = tries.world.kind
        names = [name for name in tries.links if applies(how, kind, name)]
        for number in range(self.options.tries or 2 * len(names)):
            if time.monotonic() - self.began > self.options.seconds or not names:
                return
            name, seed = names[number % len(names)], self.options.seed + number // len(names)
            began = time.monotonic()
            problems = one_try(tries, name, how, seed)
            if self.options.verbose:
                say(f"{kind} {name} {how} seed {seed}: {time.monotonic() - began:.1f} s")
            self.tried[kind, name, how] += 1
            self.passed[kind, name, how] += not problems
            if problems:
                say(f"FAILED {kind} {name} {how} seed {seed} {problems[0]}")
                for problem in problems[1:8]:
                    say(f"    {problem}")
                again = f"--world {kind} --only {name} --kinds {how} --seed {seed} --tries 1"
                say(f"    again: python -m tests.chaos {again}")

    def report(self) -> int:
        """The table; 1 where a try failed."""
        from tabulate import tabulate

        kinds = sorted({how for _, _, how in self.tried})
        rows = [
            [world, name, *(self._cell(world, name, how) for how in kinds)]
            for world, name in dict.fromkeys((world, name) for world, name, _ in self.tried)
        ]
        total = [
            f"{_sum(self.passed, how)} of {_sum(self.tried, how)}" for how in kinds
        ]  # fmt: skip
        say(tabulate([*rows, ["all", "", *total]], headers=("world", "command", *kinds)))
        say(f"{time.monotonic() - self.began:.0f} s")
        return int(self.passed != self.tried)

    def _cell(self, world: str, name: str, how: str) -> str:
        key = (world, name, how)
        return f"{self.passed[key]} of {self.tried[key]}" if self.tried[key] else ""


def applies(how: str, kind: str, name: str) -> bool:
    """Whether the kind of fault can meet this command in this world."""
    if how in disks.KINDS:
        return kind == "local"
    if how == "rot":
        return kind == "local" and name in rot.READERS
    return kind == "s3" if how == "stores" else True


def one_try(tries: Tries, name: str, how: str, seed: int) -> list[str]:
    """What was wrong; nothing, if all was well."""
    if how in disks.KINDS:
        return disks.try_disk(tries, name, how, seed)
    if how == "rot":
        return rot.try_rot(tries, name, seed)
    if how == "stores":
        return stores.try_store(tries, name, seed)
    return tries.kill(name, how, seed)


def _sum(counts: Counter[tuple[str, str, str]], how: str) -> int:
    return sum(count for (_, _, kind), count in counts.items() if kind == how)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
