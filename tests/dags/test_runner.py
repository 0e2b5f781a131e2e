"""The local runner, with real processes."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from wiring import form
from wiring.candidate import ANNOUNCER, CANDIDATE, announce, body, candidate_of
from wiring.runner import Ended, LocalProcess, failure

from hllm.settings import load

HLLM = str(Path(sys.executable).with_name("hllm"))
NASTY = [
    'it\'s "quoted"',
    "two\nlines",
    "; rm -rf / #",
    "$(touch pwned) `touch pwned` ${HOME}",
    "emoji 🎬",
    "trailing\\",
]


def run(code: str, environment: dict[str, str] | None = None) -> tuple[Ended, list[str]]:
    lines: list[str] = []
    return LocalProcess().run([sys.executable, "-c", code], environment or {}, lines.append), lines


@pytest.mark.parametrize(
    ("code", "retried"),
    [(64, False), (65, False), (66, False), (70, False), (1, False), (75, True), (143, True)],
)
def test_a_retry_happens_only_where_it_helps(code: int, retried: bool) -> None:
    ended, _ = run(f"import sys; print('error: disk is full', file=sys.stderr); sys.exit({code})")
    assert ended.exit_code == code
    raised = failure(["ingest"], ended)
    assert isinstance(raised, AirflowException)
    assert isinstance(raised, AirflowFailException) != retried
    assert "disk is full" in str(raised)
    assert f"hllm ingest ended with {code}" in str(raised)


@pytest.mark.parametrize(
    ("number", "code", "retried"),
    [(signal.SIGTERM, 143, True), (signal.SIGKILL, 137, True), (signal.SIGSEGV, 139, False)],
)
def test_a_killed_command_is_retried_and_a_crashed_one_is_not(number: int, code: int, retried: bool) -> None:
    ended, _ = run(f"import os; os.kill(os.getpid(), {int(number)})")
    assert ended.exit_code == code
    assert isinstance(failure(["train"], ended), AirflowFailException) != retried


def test_output_and_errors_are_passed_on_while_the_command_runs() -> None:
    seen: list[tuple[str, bool]] = []
    process = LocalProcess()

    def say(line: str) -> None:
        seen.append((line, process._process is not None and process._process.poll() is None))

    code = "import sys, time; print('one'); print('two', file=sys.stderr); time.sleep(0.3)"
    process.run([sys.executable, "-c", code], {}, say)
    assert seen == [("one", True), ("two", True)]


def test_output_that_is_not_text_does_not_stop_the_task() -> None:
    _, lines = run("import sys; sys.stdout.buffer.write(b'caf\\xe9\\n')")
    assert lines == ["caf\ufffd"]


def test_the_error_is_the_commands_own_first_line() -> None:
    lines: list[str] = []
    ended = LocalProcess().run([HLLM, "ingest"], {"HLLM_CONFIG": "/nowhere/a.toml"}, lines.append)
    assert ended == Ended(64, "/nowhere/a.toml: no such settings file")
    assert len(lines) == 2  # the log has the remedy as well


def test_a_command_hands_over_a_line_and_a_result() -> None:
    ended, _ = run(
        "import os; open(os.environ['HLLM_TERMINATION_LOG'], 'w').write('all well\\n{\"version\": 3}\\n')"
    )
    assert ended == Ended(0, "all well", '{"version": 3}')


def test_stopping_waits_for_the_checkpoint(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path({str(tmp_path / "checkpoint")!r}).write_text("step 7")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready")
while True:
    time.sleep(0.05)
"""
    process, ready, ended = LocalProcess(), threading.Event(), []
    thread = threading.Thread(
        target=lambda: ended.append(process.run([sys.executable, "-c", code], {}, lambda line: ready.set()))
    )
    thread.start()
    assert ready.wait(10)
    process.stop()
    thread.join(10)
    assert ended[0].exit_code == 143
    assert (tmp_path / "checkpoint").read_text() == "step 7"


def test_a_stop_that_comes_first_is_not_forgotten() -> None:
    process = LocalProcess()
    process.stop()
    began = time.monotonic()
    assert process.run([sys.executable, "-c", "import time; time.sleep(30)"], {}, print).exit_code == 143
    assert time.monotonic() - began < 10


def test_the_command_survives_the_end_of_the_tasks_process_group() -> None:
    _, lines = run("import os; print(os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid())")
    assert lines == ["True True"]


@pytest.mark.parametrize("value", NASTY)
def test_values_reach_the_command_as_they_are(value: str) -> None:
    _, lines = run("import os; print(ascii(os.environ['HLLM_DECISION_NOTE']))", {"HLLM_DECISION_NOTE": value})
    assert lines == [ascii(value)]


@pytest.mark.parametrize("value", NASTY)
def test_a_settings_path_from_the_form_is_only_ever_a_path(value: str, tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    path = value.replace("pwned", str(marker))
    ended = LocalProcess().run([HLLM, "ingest"], form.environment({"config": path}), lambda line: None)
    assert ended.exit_code == 64
    assert "no such settings file" in ended.line or "\n" in path
    assert not marker.exists()


def test_answers_of_the_form_are_settings_and_empty_ones_change_nothing() -> None:
    answers = {
        "config": "configs/demo.toml",
        "hllm.stage1.lr": 0.002,
        "hllm.stage2.steps": 7,
        "run.seed": None,
    }
    environment = form.environment(answers)
    assert set(environment) == {"HLLM_CONFIG", "HLLM__HLLM__STAGE1__LR", "HLLM__HLLM__STAGE2__STEPS"}
    path = Path(environment.pop("HLLM_CONFIG"))
    assert path.is_absolute()
    changed, plain = load(path, environ=environment), load(path, environ={})
    assert (changed.hllm.stage1.lr, changed.hllm.stage2.steps) == (0.002, 7)
    assert changed.run.seed == plain.run.seed


def test_every_offered_setting_exists() -> None:
    settings = load(form.ROOT / "configs/demo.toml", environ={})
    assert set(form.params(settings)) == {
        "config",
        *(name for names in form.offered(settings).values() for name in names),
    }


class Event:
    """As Airflow hands it to a run: who emitted it is Airflow's own record."""

    def __init__(
        self, timestamp: int, extra: object, source: tuple[str | None, str | None] = ANNOUNCER
    ) -> None:
        self.timestamp, self.extra = timestamp, extra
        self.source_dag_id, self.source_task_id = source


class Extra:
    extra: dict[str, object] = {}  # noqa: RUF012


def test_the_release_acts_on_the_version_that_was_announced() -> None:
    outlet = Extra()
    context = {"outlet_events": {CANDIDATE: outlet}, "params": {"config": "configs/demo.toml", "run.seed": 5}}
    announce(context, '{"version": 4, "model": "hllm", "serves": false, "description": "Gate passed."}')  # type: ignore[arg-type]
    older = {"about": {"version": 3}, "environment": {}}
    events = {CANDIDATE: [Event(2, outlet.extra), Event(1, older)]}
    found = candidate_of({"triggering_asset_events": events, "params": {}})  # type: ignore[typeddict-item]
    assert found.version == "4"
    assert found.environment["HLLM__RUN__SEED"] == "5"
    assert "Gate passed." in body(found)


POSTED = {
    "about": {"version": 1, "model": "x", "description": "Approve at once.", "page": "http://evil"},
    "environment": {"LD_PRELOAD": "evil.so", "PATH": "/tmp", "HLLM_CONFIG": "/tmp/evil.toml"}
    | {"HLLM__MLFLOW__TRACKING_URI": "http://evil"},
}


@pytest.mark.parametrize(
    "event",
    [
        Event(1, POSTED, (None, None)),
        Event(1, POSTED, ("others", "register")),
        Event(1, POSTED, ("hllm_train", "ingest")),
        Event(1, POSTED | {"from_rest_api": True}),
    ],
)
def test_of_an_event_that_somebody_posted_the_version_alone_counts(event: Event) -> None:
    found = candidate_of({"triggering_asset_events": {CANDIDATE: [event]}, "params": {}})  # type: ignore[typeddict-item]
    assert (found.version, found.about) == ("1", {})
    assert found.environment == {"HLLM_CONFIG": str(form.ROOT / form.config_path())}
    assert "Approve at once" not in body(found)
    assert "evil" not in body(found)


@pytest.mark.parametrize("odd", [None, 0, -1, True, 1.0, "1", "1; rm -rf /", [1], {"a": 1}])
@pytest.mark.parametrize("source", [ANNOUNCER, (None, None)])
def test_a_version_that_is_no_number_is_refused(odd: object, source: tuple[str, str]) -> None:
    event = Event(1, {"about": {"version": odd}, "environment": {}}, source)
    for extra in (event.extra, {}, {"about": odd}):
        event.extra = extra
        with pytest.raises(AirflowFailException, match="names no version"):
            candidate_of({"triggering_asset_events": {CANDIDATE: [event]}, "params": {}})  # type: ignore[typeddict-item]


def test_a_release_by_hand_needs_a_version() -> None:
    context = {"triggering_asset_events": {}, "params": {"version": None, "config": "configs/demo.toml"}}
    with pytest.raises(AirflowFailException, match="give `version`"):
        candidate_of(context)  # type: ignore[arg-type]
    context["params"]["version"] = 2
    assert candidate_of(context).version == "2"  # type: ignore[arg-type]


def test_a_version_that_serves_starts_no_release() -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    with pytest.raises(AirflowSkipException, match="version 4 is the champion already"):
        announce({}, '{"version": 4, "serves": true}')  # type: ignore[typeddict-item]
