"""What keeps a champion fresh, in a real Airflow: rows arrive, DAGs are switched on, the rows are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hllm import settings as settings_module
from hllm.demo.api import Api
from hllm.demo.follow import Stopped, follow
from hllm.demo.services import processes, start_airflow
from hllm.settings import Settings
from tests import world
from tests.conftest import Trained, free_port
from tests.features.refreshing import catalogue, read_items, read_users, serve

TODAY = world.START + 3_600 * 200


@dataclass
class Company:
    """A champion, an Airflow, and a log and a catalogue that go on."""

    settings: Settings
    api: Api
    home: Path
    source: world.TinySource

    def arrive(self, events: list[tuple[str, str, int]], **items: list[Any]) -> None:
        world.write_items(self.source.items, **items)
        header = ["user_id", "item_id", "timestamp"]
        world.write_csv(self.source.interactions, header, self.source.events + events)

    def run(self, dag: str, say: Callable[[str], Any]) -> str:
        run = self.api.trigger(dag, {})
        self.api.patch(f"/api/v2/dags/{dag}", {"is_paused": False})
        follow(self.api, dag, run, self.home, say)
        return run

    def log(self, dag: str, run: str, task: str) -> str:
        folder = self.home / "logs" / f"dag_id={dag}" / f"run_id={run}" / f"task_id={task}"
        return (folder / "attempt=1.log").read_text("utf-8")


@pytest.fixture
def company(trained: Trained, tiny_source: world.TinySource, tmp_path: Path) -> Iterator[Company]:
    source = world.TinySource(
        tmp_path / "items.parquet", tmp_path / "interactions.csv", [], list(tiny_source.events)
    )
    served = serve(trained, tmp_path)
    data = {"items": str(source.items), "interactions": str(source.interactions)}
    served = served.model_copy(update={"data": served.data.model_copy(update=data)})
    config = tmp_path / "hllm.toml"
    config.write_text(world.toml(served.model_dump(mode="json")))
    settings, home = settings_module.load(config, environ={}), tmp_path / "airflow"
    with processes(home / "services") as group:
        airflow = start_airflow(group, settings, str(config), home, wish=free_port())
        yield Company(settings, Api(airflow), home, source)


@pytest.mark.slow
def test_rows_that_arrive_are_read_after_both_dags(company: Company, tiny_source: world.TinySource) -> None:
    columns = catalogue(tiny_source)
    for name, value in (("item_id", "new one"), ("title", "Brand new"), ("genre", "heist")):
        columns[name].append(value)
    company.arrive([("u3", "new one", TODAY + 10), ("fresh", "item20", TODAY + 20)], **columns)

    said: list[str] = []
    run = company.run("hllm_items", said.append)
    assert re.search(r"refresh-items .* refresh: 1 items of version 1 as of .*, readable from", said[-1])
    assert company.api.ended("hllm_items", run, "refresh-items")["exit_code"] == 0
    assert read_items(company.settings, ["new one"])["item_model_version"] == ["1"]

    run = company.run("hllm_users", said.append)
    assert re.search(r"refresh-users .* refresh: 2 users of version 1 as of .*, readable from", said[-1])
    assert any("reused, nothing changed" in line for line in said if "validate" in line)
    assert "refresh: 2 users of version 1" in company.log("hllm_users", run, "refresh-users")
    seen = [sum(user == "u3" for user, _, _ in tiny_source.events) + 1, 1]
    assert read_users(company.settings, ["u3", "fresh"])["user_events"] == seen

    run = company.run("hllm_watch", said.append)
    assert re.search(r"version 1 is fresh, complete and sound -> .*index\.html", said[-1])
    assert company.api.ended("hllm_watch", run, "watch")["line"].startswith("watch: version 1 is fresh")

    # Nothing new: said so, and nothing written. Then users whom nobody refreshed: an alert.
    company.run("hllm_items", said.append)
    assert "refresh: reused, items of version 1" in said[-1]
    company.arrive([(f"new {n}", "item20", TODAY + n) for n in range(30)], **columns)
    company.run("hllm_watch", said.append)  # these were not read yet
    company.run("hllm_items", said.append)
    with pytest.raises(Stopped, match="limits are passed: user_coverage") as stopped:
        company.run("hllm_watch", said.append)
    assert stopped.value.exit_code == 66
