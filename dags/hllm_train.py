"""From raw log to a registered candidate: one task per step of `hllm plan`, in its order.

Triggered by hand, or by whatever schedule you give it. Its last task announces the candidate that starts
`hllm_release`.
"""

from __future__ import annotations

from urllib.parse import quote

from airflow.sdk import DAG, Asset
from wiring import form
from wiring.candidate import CANDIDATE, announce
from wiring.runner import hllm_task, of_the_form, retries

from hllm.pipeline import steps

settings = form.settings()

with DAG(
    "hllm_train",
    schedule=None,
    description="From raw log to a registered candidate",
    catchup=False,
    params=form.params(settings),
    max_active_runs=1,
    max_active_tasks=settings.runner.parallel_steps,
    default_args=retries(settings),
    tags=["hllm"],
    doc_md=__doc__,
) as dag:
    outputs = {
        name: Asset(f"{settings.run.name}/{name}", uri=f"hllm://{quote(settings.run.name, safe='')}/{name}")
        for name in steps(settings)
    }
    tasks = {}
    for step in steps(settings).values():
        tasks[step.name] = hllm_task(
            settings,
            step.name,
            step.argv,
            environment=of_the_form,
            task_display_name=step.name,
            inlets=[outputs[need] for need in step.needs],
            outlets=[outputs[step.name]],
            doc_md=f"**{step.title}**\n\n`hllm {' '.join(step.argv)}`\n\nDone already with the same settings "
            "and data: it says so and ends at once. Stopped on its way: the next try continues.",
        )
        for need in step.needs:
            tasks[need] >> tasks[step.name]
    register = hllm_task(
        settings,
        "register",
        ("register",),
        environment=of_the_form,
        on_result=announce,
        inlets=[outputs["evaluate"]],
        outlets=[CANDIDATE],
        doc_md="**MLflow version, gate, report, alias `candidate`**\n\n`hllm register`\n\n"
        "A failed gate ends the run with exit code 66; the version in MLflow says why.",
    )
    tasks["evaluate"] >> register
    if "rank" in tasks:
        tasks["rank"] >> register
