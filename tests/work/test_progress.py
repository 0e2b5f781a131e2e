from __future__ import annotations

import pytest

from hllm.work.progress import Progress, track


def test_a_log_gets_one_line_of_values(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=4, unit="step") as progress:
        for _ in range(4):
            progress.advance(1, loss=2.5)
    (line,) = capsys.readouterr().err.splitlines()
    fields = dict(field.split("=") for field in line.split())
    assert (fields["what"], fields["done"], fields["total"], fields["loss"]) == ("train", "4", "4", "2.5")
    assert float(fields["seconds_left"]) == 0


def test_an_unknown_total_promises_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("ingest", total=0) as progress:
        progress.advance(65_536)
    (line,) = capsys.readouterr().err.splitlines()
    assert "done=65536" in line
    assert "left" not in line
    assert "total" not in line


def test_a_failure_does_not_say_that_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Progress("train", total=4) as progress:
        progress.advance(1 // 0)
    assert capsys.readouterr().err == ""


def test_tracking_passes_everything_on() -> None:
    assert list(track("embed", "abc", total=3)) == ["a", "b", "c"]
