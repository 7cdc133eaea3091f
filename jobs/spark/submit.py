"""How `finpro` starts a Spark job: the spark-submit command line, and the environment it runs in."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from conf.settings import CONF_DIR, Settings, finpro_home, load_settings
from jobs.local.class_archive import from_archive
from jobs.local.jars import spark_home, spark_jars
from jobs.local.java import quoted, spark_java_home
from jobs.local.private_files import private_directory

_JOBS = Path(__file__).resolve().parents[1]
_ROOT = _JOBS.parent
_PACKAGES = ("conf", "batch", "streaming", "expectations", "jobs")
# Hadoop's own local file system starts a process for every permission change: 60 ms for each file of a checkpoint.
_LOCAL_FILES = "com.globalmentor.apache.hadoop.fs.BareLocalFileSystem"
# Spark's own second choice, and the one that goes by this file system. The property is none that Spark documents: without
# the class every query fails when it starts.
_CHECKPOINTS = "org.apache.spark.sql.execution.streaming.checkpointing.FileSystemBasedCheckpointFileManager"


# Delta plans for every query of a session that has them: only jobs that read or write the lakehouse do.
DELTA = [
    "spark.sql.extensions=io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog=org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # Of two commits with one number, Cloud Storage refuses the second.
    "spark.delta.logStore.gs.impl=io.delta.storage.GCSLogStore",
    # Into how many parts a table's list of files is divided: 50 by default, of which each is a task.
    "spark.databricks.delta.snapshotPartitions=4",
]
# Each of these tasks generates Delta's code anew, for a tenth of a second; two years of whole days are some thousand files.
_LOCAL_DELTA = [*DELTA, "spark.databricks.delta.snapshotPartitions=1"]


def spark_submit(
    job: str, arguments: Sequence[str], *, master: str, memory: str, conf: Sequence[str], delta: bool = False
) -> list[str]:
    """The command that runs `jobs/<job>.py` with these arguments.

    Args:
        job: name of the job's file, without `.py`.
        arguments: of the job.
        master: Spark master URL.
        memory: heap of the driver, and on a cluster of each executor, such as "1g".
        conf: further Spark properties, `key=value`, which win over conf/spark-defaults.conf.
        delta: the job reads or writes Delta tables.

    Raises:
        SettingsError: a setting cannot be used.
        PlatformError: a jar is missing and cannot be fetched.
    """
    command = [str(spark_home() / "bin" / "spark-submit"), "--master", master, "--name", f"finpro {job}"]
    command += ["--properties-file", str(CONF_DIR / "spark-defaults.conf"), "--driver-memory", memory]
    if is_local(master):
        # A heap that grows in steps is collected whole before each, which holds up whatever is at work.
        command += ["--conf", f"spark.driver.defaultJavaOptions={' '.join([*from_archive(), f'-Xms{memory}'])}"]
        command += ["--conf", f"spark.hadoop.fs.file.impl={_LOCAL_FILES}", "--conf", "spark.ui.enabled=false"]
        command += ["--conf", f"spark.sql.streaming.checkpointFileManagerClass={_CHECKPOINTS}"]
    else:
        command += ["--jars", ",".join(map(str, spark_jars()))]
        # (Its own option would win over a later `--conf`.)
        command += ["--conf", f"spark.executor.memory={memory}", "--py-files", str(package())]
    of_delta = (_LOCAL_DELTA if is_local(master) else DELTA) if delta else []
    for entry in [*cloud_storage_properties(load_settings()), *of_delta, *conf]:
        command += ["--conf", entry]
    return [*command, str(_JOBS / f"{job}.py"), *arguments]


def cloud_storage_properties(settings: Settings) -> list[str]:
    """The Spark properties, `key=value`, that lead gs:// to where the settings say: nothing for the real Cloud Storage.

    There the connector finds its credentials as Google's own libraries do.
    """
    if settings.storage_emulator_host is None:
        return []
    return [
        f"spark.hadoop.fs.gs.storage.root.url={settings.storage_emulator_host.rstrip('/')}/",
        f"spark.hadoop.fs.gs.project.id={settings.require('gcp_project')}",
        "spark.hadoop.fs.gs.auth.type=UNAUTHENTICATED",
        # What the emulator lacks: gRPC, the move operation, folders of their own.
        "spark.hadoop.fs.gs.client.type=HTTP_API_CLIENT",
        "spark.hadoop.fs.gs.operation.move.enable=false",
        "spark.hadoop.fs.gs.hierarchical.namespace.folders.enable=false",
    ]


def environment(job: str, *, master: str) -> dict[str, str]:
    """The environment for spark-submit: Java and its class path, Python, and where the log goes.

    A local driver has the jars behind PySpark's own, where the archive of its classes wants them. It runs on this Python; so do
    the workers, unless PYSPARK_PYTHON names another, as on machines of a cluster.
    """
    log = log_file(job)
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    jars = spark_jars() if is_local(master) else []
    python = os.environ.get("PYSPARK_PYTHON", sys.executable)
    # A local cluster starts executors as any cluster does, and they must know Spark's home.
    installed_pyspark = is_local(master) and not master.startswith("local-cluster") and python == sys.executable
    options = {"log4j2.configurationFile": CONF_DIR / "log4j2.properties", "finpro.log.file": log}
    return {
        **os.environ,
        # On a cluster the driver imports the package that its workers get, which lies elsewhere and holds no plain files.
        "FINPRO_HOME": str(finpro_home()),
        "FINPRO_RULES": str(load_settings().rules),
        "JAVA_HOME": str(spark_java_home(installed_pyspark=installed_pyspark)),
        "SPARK_HOME": str(spark_home()),
        "SPARK_DIST_CLASSPATH": os.pathsep.join([*map(str, jars), *_of_environment("SPARK_DIST_CLASSPATH")]),
        "PYSPARK_PYTHON": python,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_SUBMIT_OPTS": " ".join(f"-D{name}={quoted(value)}" for name, value in options.items()),
        "SPARK_LOCAL_IP": os.environ.get("SPARK_LOCAL_IP", "127.0.0.1"),
        "POLARS_MAX_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *_of_environment("PYTHONPATH")]),
    }


def is_local(master: str) -> bool:
    """Whether driver and workers are this machine's only."""
    return master.startswith("local")


def _of_environment(path: str) -> list[str]:
    """What a variable that lists files or folders holds already."""
    return [entry for entry in os.environ.get(path, "").split(os.pathsep) if entry]


def log_file(job: str) -> Path:
    """Where Spark logs while a job runs."""
    return finpro_home() / "logs" / f"{job}.log"


def package() -> Path:
    """finpro's own modules as a zip, for the workers of a cluster: what the wheel holds, made without building tools.

    It is replaced as a whole: a running job may hand the former one to a new executor at any time.
    """
    target = finpro_home() / "package" / "finpro.zip"
    private_directory(target.parent)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    with ZipFile(draft, "w", ZIP_DEFLATED) as archive:
        for path in sorted(path for name in _PACKAGES for path in (_ROOT / name).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                archive.write(path, path.relative_to(_ROOT))
    return draft.replace(target)
