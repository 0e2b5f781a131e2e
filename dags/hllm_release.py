"""From candidate to champion: a person decides, then publish, verify, promote.

Started by the candidate that `hllm_train` announces. Every task acts on the version of that announcement.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk import DAG, Context, Label, Param
from wiring import form
from wiring.candidate import CANDIDATE, body, candidate_of
from wiring.runner import hllm_task, retries

settings = form.settings()


class Decision(ApprovalOperator):
    """Airflow's approval, about the candidate of this run; either answer has a branch of its own."""

    def __init__(self, *, approved: str, rejected: str, **kwargs: Any) -> None:
        super().__init__(subject="Release this model?", **kwargs)
        self.approved, self.rejected = approved, rejected

    def execute(self, context: Context) -> Any:
        candidate = candidate_of(context)
        self.subject = f"Release {candidate.about.get('model', 'hllm')} version {candidate.version}?"
        self.body = body(candidate)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> None:
        answer = HITLOperator.execute_complete(self, context, event)
        decision = {
            "HLLM_DECIDED_BY": answer["responded_by_user"]["name"],
            "HLLM_DECIDED_AT": answer["responded_at"].isoformat(timespec="seconds"),
            "HLLM_DECISION_NOTE": answer["params_input"].get("note") or "",
        }
        approved = answer["chosen_options"] == [self.APPROVE]
        # Now, because skipping ends this method. The second is for whoever follows the run, as in runner.py.
        context["ti"].xcom_push("decision", decision)
        line = f"{answer['chosen_options'][0]} by {decision['HLLM_DECIDED_BY']}"
        context["ti"].xcom_push("ended", {"exit_code": 0, "line": line})
        other = self.rejected if approved else self.approved
        self.skip(
            ti=context["ti"], tasks=[task for task in self.get_direct_relatives() if task.task_id == other]
        )


def environment(context: Context) -> Mapping[str, str]:
    """The candidate's settings, and who decided what, when and why."""
    candidate = candidate_of(context)
    decision = context["ti"].xcom_pull(task_ids="approve", key="decision")
    return {**candidate.environment, "HLLM_VERSION": candidate.version, **decision}


with DAG(
    "hllm_release",
    schedule=[CANDIDATE],
    description="A person decides; then publish, verify, promote",
    catchup=False,
    max_active_runs=16,  # a candidate that nobody answers must not hide the next one
    params={
        "version": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            description="Only when triggered by hand: the MLflow version to release.",
        ),
        "config": Param(
            form.config_path(),
            type="string",
            minLength=1,
            description="Only when triggered by hand: the settings file of that version.",
        ),
    },
    default_args=retries(settings),
    tags=["hllm"],
    doc_md=__doc__,
) as dag:
    approve = Decision(
        task_id="approve",
        approved="publish",
        rejected="reject",
        params={
            "note": Param(
                "", type=["null", "string"], title="Note", description="Why; kept with the version in MLflow."
            )
        },
        response_timeout=timedelta(hours=settings.release.timeout_hours),
        doc_md="**A person decides.** Nobody in `release.timeout_hours`: the run fails.",
    )
    publish, verify, promote, reject = (
        hllm_task(
            settings,
            name,
            (name,),
            environment=environment,
            max_active_tis_per_dag=1,
            doc_md=f"**{what}**\n\n`hllm {name}`",
        )
        for name, what in (
            ("publish", "User and item vectors to Feast, in views of this version"),
            ("verify", "Read back from Feast and compare with the export"),
            ("promote", "The alias `champion` moves to this version, last of all"),
            ("reject", "The decision and its note are kept with the version"),
        )
    )
    approve >> Label("approved") >> publish >> verify >> promote
    approve >> Label("rejected") >> reject
