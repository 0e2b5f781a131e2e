"""Every setting, in one frozen tree read from one TOML file.

Order of precedence, last wins: the defaults of the sections, the TOML file, the environment
(`HLLM__TRAIN__STAGE1__BATCH_SIZE=64`), `--set train.stage1.batch_size=64`.
Unknown keys are errors. `Settings.model_json_schema()` also feeds the trigger form in Airflow.
"""

from hllm.settings.data import Columns, Data, Prepare, Validation
from hllm.settings.evaluation import Evaluation, Gate, Ranking
from hllm.settings.keys import describe
from hllm.settings.loading import ENV_PREFIX, load, read_toml
from hllm.settings.model import Decoder, IdModel, Model, UserFeatures
from hllm.settings.run import Run
from hllm.settings.runner import Pod, Report, Runner
from hllm.settings.section import Section
from hllm.settings.services import Feast, Mlflow, Release, Watch
from hllm.settings.training import Embed, Stage, Train
from hllm.settings.tree import Settings

__all__ = [
    "ENV_PREFIX",
    "Columns",
    "Data",
    "Decoder",
    "Embed",
    "Evaluation",
    "Feast",
    "Gate",
    "IdModel",
    "Mlflow",
    "Model",
    "Pod",
    "Prepare",
    "Ranking",
    "Release",
    "Report",
    "Run",
    "Runner",
    "Section",
    "Settings",
    "Stage",
    "Train",
    "UserFeatures",
    "Validation",
    "Watch",
    "describe",
    "load",
    "read_toml",
]
