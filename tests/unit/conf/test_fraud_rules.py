"""`fraud_rules.toml`, typed."""

from pathlib import Path

import pytest

from conf.errors import RulesError
from conf.rules import load_rules
from conf.settings import CONF_DIR


def test_the_shipped_rules_enforce_every_rule() -> None:
    rules = load_rules(CONF_DIR / "fraud_rules.toml")
    assert {rule.mode for rule in rules.rules.values()} == {"enforce"}


def test_a_rule_can_be_put_in_shadow(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('version = "1"\n[night_amount]\nmode = "shadow"\nabove = 5\n[repeat_purchase]\nmode = "enforce"\n')
    rules = load_rules(path)
    assert rules.in_shadow == {"night_amount"}
    assert rules.limits.night_amount.above == 5


def test_a_mode_is_of_a_rule_and_one_of_two(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('version = "1"\nmode = "shadow"\n[night_amount]\nmode = "off"\n')
    with pytest.raises(RulesError) as refused:
        load_rules(path)
    assert "night_amount.mode: Input should be 'enforce' or 'shadow' (found 'off')" in str(refused.value)
    assert "mode: unknown key" in str(refused.value)
