"""What docs/containers.md says, on a real engine, from the first command to the last.

Each test goes on from where the one before ended.

It takes half an hour on two cores, most of it Airflow's and builds. Where no registry can be reached, images of others are
stood in for: what then remains untested the page says.
"""

import json
import re
import time
from collections.abc import Callable, Iterator

import pytest
import requests

from tests.containers.engine import Containers, stand_ins, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.timeout(1800),
]

PAGES = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """The checkout; what it starts is deleted with its data in the end."""
    found = stand_ins()
    print(f"\nstood in for: {', '.join(found) or 'nothing'}")
    project = Containers(tmp_path_factory.mktemp("checkout"))
    try:
        with project.watched():
            yield project
    finally:
        if (project.folder / ".env").exists():
            project.sh("down.sh", "--volumes")
        print("\n".join(f"{name}: at most {share:.0%} of its memory" for name, share in sorted(project.peaks.items())))


def until(holds: Callable[[], bool], *, seconds: float) -> None:
    """Wait until `holds()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(2)


def unwell(containers: Containers) -> dict[str, str]:
    """The services that are neither healthy nor ended well, and what they are."""
    found = {}
    for name, shown in containers.containers().items():
        state = shown["State"]
        if state["Status"] == "running":
            health = state.get("Health", {}).get("Status", "unchecked")
            if health != "healthy":
                found[name] = health
        elif state["Status"] != "exited" or state["ExitCode"] != 0:
            found[name] = f"{state['Status']} {state['ExitCode']}"
    return found


def all_are_well(containers: Containers) -> bool:
    """Whether every service is healthy, or has ended well."""
    return not unwell(containers)


def parts(containers: Containers) -> dict[str, dict[str, str]]:
    """What `finpro status` says of each part."""
    said = containers.finpro("status", "--json", check=False)
    found = json.loads(next(line for line in said.splitlines() if line.startswith('{"healthy"')))["parts"]
    return {part["part"]: part for part in found}


def settle(containers: Containers) -> None:
    """Stop the shop, and wait until all that it has sent is stored and archived."""
    containers.compose("stop", "shop")
    for job in ("screen", "archive"):
        until(lambda job=job: ", 0 messages wait" in parts(containers)[job]["text"], seconds=300)  # type: ignore[misc]


def audited(containers: Containers) -> str:
    """What the audit says; nothing of it is unexplained (that is its exit code), and at most that a reason came too late.

    The shop back-dates planted night orders to the last night: where two of them make a pattern, it is hours behind.
    """
    said = containers.finpro("audit")
    assert set(re.findall(r"^ +\d+  (.*)$", said, re.MULTILINE)) <= {"reasons missing: late"}, said
    return said


def acknowledged(containers: Containers) -> int:
    """How many orders the shop has sent, as it says itself."""
    said = containers.compose("logs", "--no-log-prefix", "shop")
    return sum(int(number.replace(",", "")) for number in re.findall(r"^([\d,]+) orders acknowledged", said, re.MULTILINE))


def test_one_command_builds_and_starts_all_that_runs_without_profiles_and_orders_that_flow(containers: Containers) -> None:
    said = containers.sh("up.sh", "demo")

    assert PAGES in said
    assert set(containers.containers()) == {"kafka", "postgres", "migrate", "screen", "archive", "pages", "shop"}
    assert unwell(containers) == {}
    until(lambda: int(containers.query("select count(*) from raw_orders")) > 20_000, seconds=120)


def test_the_broker_has_our_configuration_though_nobody_else_could_read_the_checkout(containers: Containers) -> None:
    said = containers.compose("exec", "--no-TTY", "kafka", "cat", "/opt/kafka/config/server.properties")

    assert "advertised.listeners=CONTAINERS://kafka:9092,HOST://127.0.0.1:29092" in said


def test_all_images_can_be_built_for_both_kinds_of_machine_at_once(containers: Containers) -> None:
    both = ["linux/amd64", "linux/arm64"]
    wanted = [word for machine in both for word in ("--set", f"*.platform={machine}")]
    said = containers.docker("buildx", "bake", "--file", "docker-compose.yml", *wanted, "--print")
    targets = json.loads(said[said.index("{\n") :])["target"]

    assert {target["target"]: target["platforms"] for target in targets.values()} == dict.fromkeys(
        ("finpro", "airflow", "bigquery"), both
    )


def test_a_configuration_that_kafka_cannot_read_is_said_instead_of_left_out(containers: Containers) -> None:
    conf = containers.folder / "conf" / "docker" / "kafka"
    conf.chmod(0o700)
    try:
        said = containers.compose("run", "--rm", "--no-TTY", "--no-deps", "kafka", check=False)
    finally:
        conf.chmod(0o755)

    assert "cannot be read by user 1000: chmod -R a+rX" in said


def test_the_same_command_again_changes_no_secret(containers: Containers) -> None:
    before = containers.secrets
    containers.sh("up.sh", "demo")

    assert containers.secrets == before


def test_a_command_sees_the_jobs_of_other_containers(containers: Containers) -> None:
    found = parts(containers)

    for job in ("screen", "archive"):
        assert found[job]["state"] == "ok"
        assert re.match(r"runs for .* \(process \d+ at \w+\), last micro-batch", found[job]["text"])
    assert found["lakehouse"]["state"] == "ok"


def test_sparks_pages_are_there_for_this_machine(containers: Containers) -> None:
    for port in (4040, 4041):
        assert "finpro" in requests.get(f"http://127.0.0.1:{port}/jobs/", timeout=20).text


def test_nothing_is_lost_when_parts_are_killed_while_orders_flow(containers: Containers) -> None:
    for service in ("screen", "kafka", "postgres"):
        before = int(containers.query("select count(*) from raw_orders"))
        containers.kill(service)
        until(lambda: all_are_well(containers), seconds=300)
        until(lambda before=before: int(containers.query("select count(*) from raw_orders")) > before, seconds=120)  # type: ignore[misc]

    assert containers.containers()["shop"]["RestartCount"] == 0  # it waited for Kafka
    settle(containers)
    sent = acknowledged(containers)
    assert containers.query("select count(*) from raw_orders") == str(sent)
    assert f"audited {sent:,} orders, 0 duplicates and 0 dead letters: {sent:,} messages" in audited(containers)


def test_commands_run_beside_the_services(containers: Containers) -> None:
    assert "file" in containers.finpro("maintain")
    assert "backtest.html" in containers.finpro("backtest", "--rules", "conf/fraud_rules.toml")
    assert requests.get(f"{PAGES}/backtest.html", timeout=20).status_code == 200


def test_down_and_up_again_keep_all(containers: Containers) -> None:
    before = containers.query("select count(*) from raw_orders")
    containers.sh("down.sh")
    assert containers.containers() == {}
    containers.sh("up.sh", "demo")

    assert int(containers.query("select count(*) from raw_orders")) >= int(before)
    until(lambda: int(containers.query("select count(*) from raw_orders")) > int(before), seconds=120)


def test_a_restart_of_everything_ends_healthy(containers: Containers) -> None:
    containers.compose("restart")

    until(lambda: all_are_well(containers), seconds=300)


def test_the_report_is_written_and_can_be_opened_and_nothing_else_of_the_home(containers: Containers) -> None:
    said = containers.sh("up.sh", "demo", "warehouse", "monitoring")

    assert unwell(containers) == {}
    assert "the report is /var/lib/finpro/report.html" in said
    first = requests.get(PAGES, timeout=20).text
    for page in ("report.html", "data_docs/index.html", "dbt_docs/index.html"):
        assert f'href="{page}"' in first
        assert requests.get(f"{PAGES}/{page}", timeout=20).status_code == 200
    for other in ("lakehouse/bronze/orders/_delta_log/00000000000000000000.json", "logs/screen.log", "data_docs", "%2e%2e/etc"):
        assert requests.get(f"{PAGES}/{other}", timeout=20).status_code == 404


def test_what_watches_can_be_opened(containers: Containers) -> None:
    asked = requests.get("http://127.0.0.1:9090/api/v1/targets", timeout=20).json()["data"]["activeTargets"]

    assert {target["labels"]["instance"]: target["health"] for target in asked if "finpro" in target["scrapePool"]} == {
        "screen": "up",
        "archive": "up",
    }
    for port in (3000, 8082):
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=20).ok
    names = [one["name"] for one in requests.get("http://127.0.0.1:18080/api/v1/applications", timeout=30).json()]
    assert {"finpro screen_orders", "finpro archive_orders"} <= set(names)


def test_airflow_runs_its_dags_unasked(containers: Containers) -> None:
    containers.sh("down.sh")
    containers.compose("up", "--detach", "--wait", "kafka", "postgres", "gcs", "bigquery", "pages")
    containers.compose("up", "warehouse-migrate")
    services = ("airflow-scheduler", "airflow-dag-processor", "airflow")
    # An image of the day before, which Compose would take, runs the code of the day before on today's tables.
    containers.compose("up", "--build", "--detach", "--wait", "--wait-timeout", "1200", *services, seconds=1500)

    def airflow(*command: str) -> str:
        return containers.compose("exec", "--no-TTY", "airflow-scheduler", "airflow", *command)

    def is_known() -> bool:
        return "transformation_dbt" in airflow("dags", "list")

    until(is_known, seconds=180)
    listed = json.loads(airflow("dags", "list", "--output", "json").splitlines()[-1])
    assert {dag["dag_id"]: str(dag["is_paused"]) for dag in listed} == dict.fromkeys([dag["dag_id"] for dag in listed], "False")
    assert requests.get("http://127.0.0.1:8080/", timeout=20).ok
    airflow("dags", "trigger", "batch_raw_loads")
    until(
        lambda: "success" in airflow("dags", "list-runs", "transformation_dbt", "--output", "plain"),
        seconds=900,
    )


def test_no_secret_can_be_seen_but_where_the_page_says(containers: Containers) -> None:
    shown = {name: json.dumps(one) for name, one in containers.containers().items()}
    seen = {name: {service for service, text in shown.items() if value in text} for name, value in containers.secrets.items()}
    ours = {
        name
        for name in shown
        if name not in ("kafka", "postgres", "gcs", "bigquery", "pages", "kafka-ui", "grafana", "prometheus")
    }
    airflows = {name for name in ours if name.startswith("airflow")}

    assert seen.pop("FINPRO_POSTGRES_SUPERUSER_PASSWORD") == seen.pop("FINPRO_GRAFANA_PASSWORD") == set()
    assert seen.pop("FINPRO_POSTGRES_PASSWORD") <= ours
    assert seen.pop("FINPRO_AIRFLOW_PASSWORD") == {"airflow-init"}
    assert all(services == airflows for services in seen.values()), seen
    said = containers.compose("logs")
    assert not [name for name, value in containers.secrets.items() if value in said]


def test_on_the_cluster_jobs_share_the_workers_and_commands_need_none(containers: Containers) -> None:
    containers.sh("down.sh")
    with (containers.folder / ".env").open("a") as env:
        env.write("FINPRO_SPARK_MASTER=spark://spark-master:7077\n")
    containers.sh("up.sh", "demo", "cluster")

    def applications() -> dict[str, int]:
        return {
            one["name"]: one["cores"] for one in requests.get("http://127.0.0.1:8090/json/", timeout=20).json()["activeapps"]
        }

    until(lambda: applications() == {"finpro screen_orders": 2, "finpro archive_orders": 2}, seconds=180)
    before = int(containers.query("select count(*) from raw_orders"))
    until(lambda: int(containers.query("select count(*) from raw_orders")) > before, seconds=180)
    assert unwell(containers) == {}
    settle(containers)
    audited(containers)


def test_memory_stayed_below_the_limits(containers: Containers) -> None:
    killed = [name for name, shown in containers.containers().items() if shown["State"]["OOMKilled"]]

    assert killed == []
    assert {"kafka", "postgres", "screen", "archive", "airflow-scheduler", "bigquery"} <= set(containers.peaks)
    # An engine that cannot account for memory says 0% of everything: that is nothing to be content with.
    assert {name: share for name, share in containers.peaks.items() if not 0 < share <= 0.95} == {}


def test_every_volume_has_a_name_and_goes_when_it_is_asked_to(containers: Containers) -> None:
    named = [
        f"finpro-test_{name}" for name in ("airflow", "bigquery", "finpro", "gcs", "grafana", "kafka", "postgres", "prometheus")
    ]
    assert set(containers.named("volume")) <= set(named)
    mounted = [mount for one in containers.containers().values() for mount in one["Mounts"] if mount["Type"] == "volume"]
    assert {mount["Name"] for mount in mounted} <= set(named)

    containers.sh("down.sh", "--volumes")

    assert containers.named("volume") == containers.named("network") == []
    assert containers.containers() == {}
