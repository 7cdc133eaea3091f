"""finpro's settings in Airflow: of the connection `finpro`, where there is one, over those of the environment."""

import json
import os

from airflow.sdk import Connection
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.sdk.log import mask_secret
from pydantic import SecretStr

from conf.errors import SettingsError
from conf.settings import Settings, load_settings, variable

CONNECTION = "finpro"


def task_settings() -> Settings:
    """The settings of a task: those of the connection outrank the environment's. Its secrets are masked in Airflow's logs.

    The connection's extra is a JSON object, a setting by its name: `{"postgres_dsn": "postgresql://…", "gcp_project": "…"}`. It
    can come from Airflow's database, from `AIRFLOW_CONN_FINPRO`, or from a secrets backend. What it says goes into the
    environment of this process, which is the task's own: Spark and dbt find it there.

    Raises:
        SettingsError: a value cannot be used, or the connection names what is no setting.
    """
    os.environ.update(_given())
    settings = load_settings()
    for name, value in settings:
        if isinstance(value, SecretStr) and value.get_secret_value():
            mask_secret(value.get_secret_value(), name)
    return settings


def _given() -> dict[str, str]:
    """What the connection says, as variables of the environment."""
    try:
        extra = Connection.get(CONNECTION).extra or "{}"
    except AirflowNotFoundException:
        return {}
    try:
        given = dict(json.loads(extra))
    except (ValueError, TypeError) as error:
        raise SettingsError(f"The extra of Airflow's connection {CONNECTION} is not a JSON object of settings.") from error
    if unknown := sorted(given.keys() - Settings.model_fields.keys()):
        raise SettingsError(f"Airflow's connection {CONNECTION} has what is no setting of finpro's: {', '.join(unknown)}.")
    return {variable(name): str(value) for name, value in given.items()}
