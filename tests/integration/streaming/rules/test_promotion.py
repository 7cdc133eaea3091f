"""From a proposal to rules in force and back: `finpro rules propose`, `promote`, `history`, `diff`, `revert`."""

import re
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
import pytest
from pyspark.sql import SparkSession

from batch.postgres import connect
from conf.errors import PromotionRefused
from conf.rules import FraudRules
from conf.settings import CONF_DIR, Settings, variable
from jobs.local.platform import Platform
from streaming.lakehouse.tables import SILVER, silver_orders
from streaming.rules.live import LiveRules
from streaming.rules.promotion import promote
from streaming.rules.recorded import record
from tests.conftest import own_warehouse
from tests.oracle.lakes import in_turn, lake_of, purchase
from tests.runs.commands import Ended, finpro
from tests.runs.pages import Page

DELIVERED = (CONF_DIR / "fraud_rules.toml").read_text()
VERSION = re.compile(r'^version = "(.*)"$', re.MULTILINE)
DEAR = '\n[rules.dear]\nwhen = "amount_numeric >= 5000"\n'
DAYS = ("--days", "20000")  # the orders are of November 2026, whatever day it is


def rules_text(version: str, more: str = "") -> str:
    return VERSION.sub(f'version = "{version}"', DELIVERED) + more


@pytest.fixture(scope="module")
def lakehouse(spark_session: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten orders, of which one is Fraud, and three are dear."""
    orders = [purchase(f"o{n}", n * 7, 60 * n, country="SG" if n == 1 else "ID") for n in range(1, 8)]
    orders += [purchase(f"dear{n}", n, 30 * n, amount=f"{5000 + n}", amount_numeric=5000 + n) for n in range(1, 4)]
    lake, _ = lake_of(in_turn(orders), FraudRules.model_validate({"version": "2026-11-29"}))
    folder = tmp_path_factory.mktemp("lake")
    rows = [tuple(row.get(name) for name in SILVER.names) for row in lake.silver]
    spark_session.createDataFrame(rows, SILVER).write.format("delta").save(silver_orders(str(folder)))
    return folder


class Desk:
    """Where rules are worked at: the file in force, the screening that goes by it, and candidates."""

    def __init__(self, spark: SparkSession, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.live = settings, folder, settings.rules
        self.screening = LiveRules(self.live, lambda rules, since: record(spark, settings.lakehouse, rules, since))

    def candidate(self, text: str, name: str = "candidate.toml") -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def proposed(self, text: str, *limits: str, by: str = "sari", name: str = "candidate.toml") -> Ended:
        page = str(self.folder / "page.html")
        return finpro("rules", "propose", self.candidate(text, name), *DAYS, "--by", by, "--output", page, *limits)

    def promoted(self, *options: str, by: str = "sari", name: str = "candidate.toml") -> Ended:
        return finpro("rules", "promote", str(self.folder / name), "--by", by, "--why", "because", *options)

    def taken_up(self) -> str:
        """The version that screening goes by once it has looked."""
        self.screening.look()
        self.screening.look()
        with self.screening.fixed() as version:
            return version


@pytest.fixture
def desk(
    platform: Platform, spark_session: SparkSession, lakehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    shutil.copytree(lakehouse, tmp_path / "lakehouse")
    (tmp_path / "rules.toml").write_text(DELIVERED)
    with own_warehouse(platform) as warehouse:
        own = {"postgres_dsn": warehouse.require("postgres_dsn"), "rules": str(tmp_path / "rules.toml")}
        own |= {"lakehouse": str(tmp_path / "lakehouse")}
        for name, value in (platform.environment() | {variable(field): value for field, value in own.items()}).items():
            monkeypatch.setenv(name, value)
        yield Desk(spark_session, Settings(), tmp_path)


def test_a_rule_goes_from_its_proposal_into_force_and_back(desk: Desk) -> None:
    done = desk.proposed(rules_text("2", DEAR), "--capacity", "3", "--max-alerts", "4")
    assert done.returncode == 0, done.stderr
    assert "in the place of rules 2026-11-29: added rules.dear" in done.stdout
    assert "3 orders become Fraud, 0 stop being Fraud" in done.stdout
    page = Page((desk.folder / "page.html").read_text())
    assert page.parts["tile-busiest"].values == ["4"]
    assert [row[0].text for row in page.body("held")] == ["dear3", "dear2", "dear1"]
    assert desk.live.read_text() == DELIVERED

    assert desk.promoted().returncode == 0
    assert desk.live.read_text() == rules_text("2", DEAR)
    assert desk.taken_up() == "2"

    back = finpro("rules", "revert", "--by", "budi", "--why", "a family was held")
    assert "rules version 2026-11-29-again is in force, the rules of 2026-11-29" in back.stdout
    assert desk.live.read_text() == rules_text("2026-11-29-again")
    assert desk.taken_up() == "2026-11-29-again"
    forth = finpro("rules", "revert", "2", "--version", "3", "--by", "budi", "--why", "no, it was none")
    assert forth.returncode == 0, forth.stderr
    assert desk.live.read_text() == rules_text("3", DEAR)

    told = [line.split("UTC  ")[1].split(maxsplit=2) for line in finpro("rules", "history").stdout.splitlines()]
    assert told == [
        ["2026-11-29", "-", "(the file was written by hand)"],
        ["2", "sari", "because"],
        ["2026-11-29-again", "budi", "a family was held"],
        ["3", "budi", "no, it was none (not taken up by screening)"],
    ]
    differ = finpro("rules", "diff", "2026-11-29", "2").stdout.splitlines()
    assert differ[:2] == ["rules 2026-11-29 -> 2", "added rules.dear"]
    assert finpro("rules", "diff", "2").stdout.splitlines() == ["rules 2 -> 3", "they say the same"]


def test_what_was_not_proposed_as_it_stands_is_refused(desk: Desk) -> None:
    desk.candidate(rules_text("2", DEAR))
    assert (desk.promoted().returncode, desk.live.read_text()) == (20, DELIVERED)
    assert desk.proposed(rules_text("2", DEAR)).returncode == 0
    desk.candidate(rules_text("2", DEAR) + "# a comment\n")
    refused = desk.promoted()
    assert "was not proposed as it stands" in refused.stderr
    assert (refused.returncode, desk.live.read_text()) == (20, DELIVERED)


def test_a_proposal_is_stale_once_others_were_put_in_force_by_a_command_or_by_hand(desk: Desk) -> None:
    assert desk.proposed(rules_text("2", DEAR)).returncode == 0
    assert desk.proposed(rules_text("3"), by="budi", name="other.toml").returncode == 0
    assert desk.promoted("--by", "budi", name="other.toml").returncode == 0
    refused = desk.promoted()
    assert refused.returncode == 20
    assert "budi put version 3 in force" in refused.stderr
    assert desk.live.read_text() == rules_text("3")
    desk.live.write_text(DELIVERED)  # back to the very file that it was held against: still, a version was in force between
    assert desk.promoted().returncode == 20

    assert desk.proposed(rules_text("2", DEAR)).returncode == 0
    desk.live.write_text(rules_text("4"))
    refused = desk.promoted()
    assert "the file in force was changed by hand" in refused.stderr
    assert (refused.returncode, desk.live.read_text()) == (20, rules_text("4"))


def test_rules_that_do_not_keep_their_limits_come_into_force_with_a_reason_only(desk: Desk) -> None:
    done = desk.proposed(rules_text("2", DEAR), "--max-alerts", "3", "--min-precision", "0.5")
    assert done.returncode == 19
    assert "--max-alerts 3: 4 alerts on 2026-11-01" in done.stderr
    assert "--min-precision 0.5: of no alert it is known what it was" in done.stderr
    refused = desk.promoted()
    assert (refused.returncode, desk.live.read_text()) == (20, DELIVERED)
    assert "--max-alerts 3: 4 alerts on 2026-11-01" in refused.stderr
    assert desk.promoted("--despite", " ").returncode == 2
    assert desk.promoted("--despite", "two more people from Monday on").returncode == 0
    assert desk.taken_up() == "2"
    assert "because (despite its limits: two more people from Monday on)" in finpro("rules", "history").stdout


def test_a_version_that_was_used_for_other_rules_is_refused_when_it_is_proposed(desk: Desk) -> None:
    for used in ("in force", "promoted", "by hand, and replaced by hand"):
        if used == "promoted":
            assert desk.proposed(rules_text("2")).returncode == 0
            assert desk.promoted().returncode == 0
        if used == "by hand, and replaced by hand":
            for by_hand in ("4", "5"):
                desk.live.write_text(rules_text(by_hand))
                assert desk.taken_up() == by_hand
        version = {"in force": "2026-11-29", "promoted": "2"}.get(used, "4")
        refused = desk.proposed(rules_text(version, DEAR))
        assert (refused.returncode, f"version {version} was used before" in refused.stderr) == (2, True), used


def test_an_example_that_fails_is_no_proposal(desk: Desk) -> None:
    wrong = DEAR + "[[rules.dear.examples]]\nhit = true\norders = [{ amount_numeric = 4999 }]\n"
    done = desk.proposed(rules_text("2", wrong))
    assert (done.returncode, "dear, example 1" in done.stderr) == (2, True)
    assert desk.promoted().returncode == 20


def test_what_a_command_has_replaced_comes_back_although_screening_never_went_by_it(desk: Desk) -> None:
    desk.live.write_text(rules_text("2", "# by hand"))
    assert desk.proposed(rules_text("3", DEAR)).returncode == 0
    assert desk.promoted().returncode == 0
    assert finpro("rules", "revert", "--by", "budi", "--why", "no").returncode == 0
    assert desk.live.read_text() == rules_text("2-again", "# by hand")


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(desk: Desk) -> None:
    names = {version: f"{version}.toml" for version in "abcd"}
    for version, name in names.items():
        assert desk.proposed(rules_text(version, DEAR), by=version, name=name).returncode == 0
    start, said = threading.Barrier(len(names)), dict[str, str]()

    def put_in_force(version: str) -> None:
        start.wait()
        try:
            said[version] = promote(desk.settings, desk.folder / names[version], by=version, why="me")
        except PromotionRefused as error:
            said[version] = str(error)

    threads = [threading.Thread(target=put_in_force, args=(version,)) for version in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [version for version, text in said.items() if text == version]
    others = [text for version, text in said.items() if version != winner]
    assert all(f"{winner} put version {winner} in force" in text for text in others), said
    assert desk.live.read_text() == rules_text(winner, DEAR)


def test_rules_that_were_written_by_hand_come_back_although_nobody_kept_their_file(desk: Desk) -> None:
    for text in (rules_text("2", DEAR), rules_text("3"), "no TOML"):
        desk.live.write_text(text)
        desk.taken_up()
    back = finpro("rules", "revert", "--by", "budi", "--why", "broken")
    assert (back.returncode, desk.taken_up()) == (0, "3-again"), back.stderr
    assert finpro("rules", "revert", "2", "--by", "budi", "--why", "them").returncode == 0
    assert desk.taken_up() == "2-again"
    assert finpro("rules", "diff", "2").stdout.splitlines()[1:] == ["they say the same"]
    unknown = finpro("rules", "revert", "9", "--by", "budi", "--why", "them")
    assert (unknown.returncode, "9 is no version of the history: 2026-11-29, 2, 3" in unknown.stderr) == (2, True)


def test_the_record_is_added_to_and_never_changed(desk: Desk) -> None:
    assert desk.proposed(rules_text("2", DEAR)).returncode == 0
    assert desk.promoted().returncode == 0
    for table in ("rules_proposals", "rules_promotions", "rules_applications"):
        for statement in (f"update {table} set version = 'x'", f"delete from {table}", f"truncate {table} cascade"):
            with pytest.raises(psycopg2.Error, match="is a record"), connect(desk.settings.require("postgres_dsn")) as one:
                one.cursor().execute(statement)


def test_a_record_that_cannot_be_ended_leaves_the_former_file(desk: Desk) -> None:
    assert desk.proposed(rules_text("2", DEAR)).returncode == 0
    with connect(desk.settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute(
            "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$;"
            "create constraint trigger refuse after insert on rules_promotions initially deferred for each row"
            " execute function refuse()"
        )
    refused = desk.promoted()
    assert (refused.returncode, desk.live.read_text()) == (4, DELIVERED)
    assert finpro("rules", "history").stdout.count("\n") == 1


def test_a_lakehouse_in_a_bucket_is_read_without_spark(desk: Desk, spark_session: SparkSession) -> None:
    lakehouse = f"gs://{desk.settings.require('gcs_bucket')}/lake"
    assert "finpro screen" in finpro("rules", "history", FINPRO_LAKEHOUSE=lakehouse).stdout
    record(spark_session, lakehouse, FraudRules.model_validate({"version": "1"}), datetime.now(UTC))
    assert "  1  -  (the file was written by hand)" in finpro("rules", "history", FINPRO_LAKEHOUSE=lakehouse).stdout
