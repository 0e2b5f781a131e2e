from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hllm.plan import plan
from hllm.settings import Report, Settings
from hllm.work import costs
from hllm.work.artifacts import Manifest, Store, digest_of

TinySettings = Callable[..., Settings]


def manifest(
    step: str, seconds: float, usage: dict[str, float], key: str = "earlier", day: int = 1, **rows: int
) -> Manifest:
    at = f"2026-01-{day:02}T00:00:00+00:00"
    return Manifest(step, key, "s", "0", at, seconds, digest_of(key), rows=rows, usage=usage)


def test_a_meter_measures_what_was_done_since() -> None:
    meter = costs.Meter()
    before = meter.usage()[costs.CPU]
    block = bytearray(64 << 20)
    for _ in range(20):
        sum(block[:200_000])
    usage = meter.usage()
    assert before < usage[costs.CPU]
    assert usage[costs.CPU] <= meter.seconds * 16 + 1
    assert usage[costs.MEMORY] > 64
    assert usage[costs.GPU] == 0


@pytest.mark.parametrize(
    ("environ", "held"),
    [
        ({}, 0),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 0),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-2"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, 8),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1", "WORLD_SIZE": "2", "RANK": "0"}, 2),
    ],
)
def test_gpus_are_those_that_nobody_else_can_use(
    environ: dict[str, str], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert costs.gpus_held(environ) == held


def test_a_gpu_hour_has_a_price_of_its_own() -> None:
    report = Report(price_per_hour=0.5, price_per_gpu_hour=2.0)
    assert costs.price(report, 1800, 7200) == pytest.approx(0.25 + 4.0)
    both = [
        manifest("prepare", 1800, {costs.CPU: 5, costs.GPU: 0, costs.MEMORY: 10}),
        manifest("train-hllm-1", 1800, {costs.CPU: 7, costs.GPU: 3600, costs.MEMORY: 90}),
    ]
    found = costs.total(report, both)
    assert found == {
        "seconds": 3600,
        costs.CPU: 12,
        costs.GPU: 3600,
        costs.MEMORY: 90,
        "cost": pytest.approx(2.5),
    }


def test_several_machines_cost_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = costs.Meter()
    monkeypatch.setattr(costs.Meter, "seconds", 1800.0)
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    taken = manifest("train-hllm-1", 1800, meter.usage())
    before = manifest("prepare", 1800, {})  # by an HLLM that did not count machines
    report = Report(price_per_hour=0.5)
    assert costs.cost(report, taken) == pytest.approx(4 * 0.25)
    assert costs.total(report, [before, taken])["cost"] == pytest.approx(5 * 0.25)
    assert costs.total(report, [before, taken])["seconds"] == 3600


def test_the_plan_says_what_may_be_expected(
    tiny_settings: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"report.price_per_hour": 1.0, "report.price_per_gpu_hour": 3.0}
    settings = tiny_settings(**prices, **{"hllm.stage1.steps": 400})
    store = Store(settings.run.root)
    store.finish(manifest("ingest", 100.0, {}, key="older", day=1))
    store.finish(manifest("ingest", 20.0, {}, day=2))
    store.finish(manifest("train-hllm-1", 40.0, {costs.GPU: 80.0, costs.MACHINES: 80.0}, steps=100))
    plan(settings)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "about 20 s" in lines["ingest"]
    assert "about 160 s" in lines["train-hllm-1"], "four times the steps"
    # 20 s of one machine, 160 of two, 320 of a GPU
    assert lines["to"].startswith("to do: about 180 s, 0.09 GPU hours, 0.3611 USD")
    assert "never run here: validate, prepare" in lines["to"]


def test_a_step_leaves_what_it_took(tiny_settings: TinySettings, tmp_path: Path) -> None:
    from hllm.pipeline import execute

    usage = execute("ingest", tiny_settings()).manifest.usage
    assert usage[costs.CPU] > 0
    assert usage[costs.MEMORY] > 20
