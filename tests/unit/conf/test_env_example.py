"""`.env.example` is what a person copies: it must neither lack a setting nor name one that is gone."""

import re
from pathlib import Path

from conf.settings import Settings, project_root, variable

READ_FROM_THE_ENVIRONMENT_ONLY = {"FINPRO_HOME", "FINPRO_SPARK_MASTER"}


def test_env_example_names_every_setting_and_secret_of_the_containers_and_no_other() -> None:
    named = set(re.findall(r"^(?:# )?(?:export )?([A-Z_]+)=", Path(project_root(), ".env.example").read_text(), re.MULTILINE))
    asked_for = set(
        re.findall(r"\$\{([A-Z_]+)|environment: (FINPRO_[A-Z_]+)", Path(project_root(), "docker-compose.yml").read_text())
    )
    containers = {one or other for one, other in asked_for}

    assert named == {variable(field) for field in Settings.model_fields} | READ_FROM_THE_ENVIRONMENT_ONLY | containers
