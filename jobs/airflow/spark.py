"""finpro's Spark jobs as Airflow tasks: what `finpro <command>` submits, on the master of an Airflow connection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.hooks.spark_submit import SparkSubmitHook
from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from conf.errors import SettingsError
from jobs.airflow.settings import task_settings
from jobs.spark.submit import environment, spark_submit


class FinproSparkOperator(SparkSubmitOperator):
    """Runs `jobs/<job>.py` through spark-submit.

    Jars, properties and finpro's own modules are those of `finpro <command>`; they are found when the task runs, not when the
    DAG is read. The driver runs beside the task: settings reach it in its environment, and none is on a command line.

    Args:
        job: name of the job's file, without `.py`.
        arguments: of the job; templated, and one that renders to nothing is left out.
        memory: heap of the driver, and on a cluster of each executor.
        conn_id: the connection whose host is the Spark master's URL.
    """

    template_fields: Sequence[str] = ("arguments", "conf")

    def __init__(
        self, *, job: str, arguments: Sequence[str] = (), memory: str = "512m", conn_id: str = "spark_default", **keywords: Any
    ) -> None:
        super().__init__(conn_id=conn_id, **keywords)
        self.job = job
        self.arguments = list(arguments)
        self.memory = memory

    def execute(self, context: Any) -> None:
        """Submit the job and wait for its end.

        Raises:
            AirflowFailException: it cannot use its settings or rules, so that another try would not help.
            AirflowException: it failed; with the end of what it said.
            FinproError: it cannot be submitted.
        """
        submission = _Submission(
            self.job,
            [argument for argument in self.arguments if argument],
            memory=self.memory,
            conn_id=self._conn_id,
            conf=self.conf,
            deploy_mode="client",
        )
        self._hook = submission
        task_settings()  # which the driver finds in its environment
        try:
            submission.submit(env=environment(self.job, master=submission.master))
        except AirflowException as error:
            if submission.exit_code == SettingsError.exit_code:
                raise AirflowFailException(str(error)) from error
            raise


class _Submission(SparkSubmitHook):
    """The provider's way of running, watching and killing spark-submit, with finpro's command."""

    def __init__(self, job: str, arguments: list[str], *, memory: str, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._job = job
        self._job_arguments = arguments
        self._memory = memory

    @property
    def exit_code(self) -> int | None:
        """Of the driver, in client mode; None while it runs, or where it was not started."""
        return self._submit_sp.returncode if self._submit_sp else None

    @property
    def master(self) -> str:
        """The Spark master's URL, as the connection says."""
        return str(self._connection["master"])

    def _build_spark_submit_command(self, application: str) -> list[str]:
        conf = [f"{name}={value}" for name, value in self._conf.items()]
        command = spark_submit(self._job, self._job_arguments, master=self.master, memory=self._memory, conf=conf)
        self.log.info("%s, on %s: %s", Path(command[0]).name, self.master, " ".join(self._job_arguments))
        return command
