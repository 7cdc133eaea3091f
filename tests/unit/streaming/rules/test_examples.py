"""Examples beside a rule."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import RulesError
from conf.settings import CONF_DIR
from streaming.rules.examples import tried

RULE = """
version = "1"
[rules.dear_at_night]
when = "local_hour < 4 and amount_numeric > 1000000"
[[rules.dear_at_night.examples]]
hit = true
orders = [{ event_ts = 03:59:59, amount_numeric = 1000001 }]
[[rules.dear_at_night.examples]]
hit = false
note = "at four the night is over"
orders = [{ event_ts = 04:00:00, amount_numeric = 1000001 }, { event_ts = 01:00:00 }]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return path


def test_the_shipped_rules_have_examples_of_both_kinds_and_they_hold() -> None:
    assert tried(CONF_DIR / "fraud_rules.toml") == "12 examples of 6 rules hold."


def test_an_example_that_does_not_hold_is_named(tmp_path: Path) -> None:
    assert tried(written(tmp_path, RULE)) == "2 examples of 1 rules hold."
    stricter = written(tmp_path, RULE.replace("local_hour < 4", "local_hour < 5"))
    with pytest.raises(RulesError) as refused:
        tried(stricter)
    assert "1 of 2 examples" in str(refused.value)
    assert "dear_at_night, example 2 (at four the night is over): order 1 is hit and must not be" in str(refused.value)
    with pytest.raises(RulesError, match="dear_at_night, example 1: order 1 must be hit and is not"):
        tried(written(tmp_path, RULE.replace("> 1000000", "> 2000000")))


def test_an_example_has_declared_fields(tmp_path: Path) -> None:
    rules = (
        'version = "1"\n[fields]\ndevice_id = "string"\ntries = "int"\n[rules.bad]\nwhen = "device_id = \'d\' and tries > 1"\n'
        '[[rules.bad.examples]]\nhit = true\norders = [{ device_id = "d", tries = 2 }]\n'
        '[[rules.bad.examples]]\nhit = false\norders = [{ device_id = "d", tries = 1 }, { tries = 2 }, {}]\n'
    )
    assert tried(written(tmp_path, rules)) == "2 examples of 1 rules hold."
    with pytest.raises(RulesError, match=r"colour: no field of an order; the fields are .*source, device_id, tries"):
        tried(written(tmp_path, rules.replace("{}", "{ colour = 1 }")))
    with pytest.raises(RulesError, match=r"rules\.bad\.examples, number 2"):
        tried(written(tmp_path, rules.replace("tries = 1", "tries = 'one'")))


def test_a_rule_is_tried_whatever_its_mode_and_by_itself(tmp_path: Path) -> None:
    rule = RULE.replace("[[", 'mode = "off"\n[[', 1) + '[rules.all]\nwhen = "true"\n'
    assert tried(written(tmp_path, rule)) == "2 examples of 1 rules hold."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("hit = true\norders = []", "rules.dear_at_night.examples, number 1: orders"),
        ("orders = [{ event_ts = 03:59:59, amount_numeric = 1000001 }]", "rules.dear_at_night.examples, number 1: hit"),
        ("hit = true\norders = [{ colour = 1 }]", "number 1: colour: no field of an order"),
        ("hit = true\norders = [{ event_ts = 'soon' }]", "number 1: 'soon' is no time"),
        ("hit = true\norders = [{ quantity = 'many' }]", "number 1: "),
        ("hit = true\norders = [{ quantity = 99999999999999999999 }]", "number 1: "),
    ],
)
def test_an_example_that_is_none_is_named(tmp_path: Path, changed: str, message: str) -> None:
    first = "hit = true\norders = [{ event_ts = 03:59:59, amount_numeric = 1000001 }]"
    with pytest.raises(RulesError, match=re.escape(message)):
        tried(written(tmp_path, RULE.replace(first, changed)))


def test_the_command_needs_neither_spark_nor_a_service() -> None:
    run = (
        "import sys; from jobs.cli import main; sys.argv = ['finpro', 'rules', 'test'];\ntry: main()\nexcept SystemExit: pass\n"
    )
    heavy = "print({'pyspark', 'psycopg2', 'confluent_kafka'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", run + heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["12 examples of 6 rules hold.", "set()"]
