"""`.env.example` is what a person copies: it must neither lack a setting nor name one that is gone."""

import re
from pathlib import Path

from conf.settings import Settings, project_root, variable

READ_FROM_THE_ENVIRONMENT_ONLY = {"FINPRO_HOME", "FINPRO_SPARK_MASTER"}


def test_env_example_names_every_setting_and_no_other() -> None:
    named = set(re.findall(r"^(?:# )?(?:export )?([A-Z_]+)=", Path(project_root(), ".env.example").read_text(), re.MULTILINE))

    assert named == {variable(field) for field in Settings.model_fields} | READ_FROM_THE_ENVIRONMENT_ONLY
