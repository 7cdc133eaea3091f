"""A rules file as it stands: its fingerprint, how it is put in the place of another, and how it is written from a record."""

from pathlib import Path

import pytest
from hypothesis import given

from conf.errors import RulesError
from conf.rules import FraudRules
from conf.settings import CONF_DIR
from streaming.rules.content import Content, content_of, rewritten
from tests.oracle.order_sets import rule_sets

LISTS = 'version = "1"\n[lists.blocked]\nfile = "lists/blocked.csv"\n'


def written(folder: Path, text: str, **beside: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "rules.toml"
    for name, inner in beside.items():
        (folder / "lists").mkdir(parents=True, exist_ok=True)
        (folder / "lists" / f"{name}.csv").write_text(inner)
    path.write_text(text)
    return path


def test_a_fingerprint_is_that_of_the_bytes_comments_and_lists_too(tmp_path: Path) -> None:
    first = Content.read(written(tmp_path / "a", LISTS, blocked="d1\n"))
    same = Content.read(written(tmp_path / "b", LISTS, blocked="d1\n"))
    assert first.fingerprint == same.fingerprint
    comment = Content.read(written(tmp_path / "b", LISTS + "# why\n", blocked="d1\n"))
    other_list = Content.read(written(tmp_path / "b", LISTS, blocked="d2\n"))
    assert len({first.fingerprint, comment.fingerprint, other_list.fingerprint}) == 3
    assert content_of({"text": first.text, "beside": dict(first.beside)}) == first


def test_a_file_takes_the_place_of_another_with_its_lists_its_mode_and_through_a_link(tmp_path: Path) -> None:
    old = written(tmp_path, 'version = "0"\n')
    old.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(old)
    with old.open() as reader:
        Content(LISTS, {"lists/blocked.csv": "d1\n"}).write(link)
        assert reader.read() == 'version = "0"\n', "who had it open sees it change under the reader"
    assert (old.read_text(), link.is_symlink(), old.stat().st_mode & 0o777) == (LISTS, True, 0o640)
    assert (tmp_path / "lists" / "blocked.csv").read_text() == "d1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "lists", "rules.toml"]


def test_a_file_that_cannot_be_written_leaves_the_former_one(tmp_path: Path) -> None:
    old = written(tmp_path, 'version = "0"\n')
    (tmp_path / "lists").write_text("a file where a folder has to be")
    with pytest.raises(RulesError, match="cannot be written"):
        Content(LISTS, {"lists/blocked.csv": "d1\n"}).write(old)
    assert old.read_text() == 'version = "0"\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists", "rules.toml"]


@pytest.mark.parametrize("name", ["/etc/blocked.csv", "../blocked.csv"])
def test_a_list_that_does_not_lie_beside_the_rules_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RulesError, match="does not lie beside the rules"):
        Content.read(written(tmp_path, LISTS.replace("lists/blocked.csv", name)))


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"blocked\.csv"):
        Content.read(written(tmp_path, LISTS))


@given(rule_sets())
def test_rules_that_are_written_from_a_record_say_the_same(rules: FraudRules) -> None:
    assert rewritten(rules).rules == rules


def test_the_delivered_rules_and_odd_texts_survive_their_way_through_a_record() -> None:
    rules = Content.read(CONF_DIR / "fraud_rules.toml").rules
    odd = {"odd": {"when": "source = 'a\"b\\\\c'", "description": 'tab\tquote"back\\slash\x7f é 🎈', "mode": "shadow"}}
    both = FraudRules.model_validate(rules.model_dump() | {"rules": rules.model_dump()["rules"] | odd})
    assert rewritten(both).rules == both


def test_lists_survive_their_way_through_a_record(tmp_path: Path) -> None:
    entries = 'value,reason,expiry\nd1,"stolen, twice",2026-12-31T00:00:00.000001+07:00\n"d""2",,\n'
    rules = Content.read(written(tmp_path, LISTS, blocked=entries)).rules
    assert rewritten(rules).rules == rules
    allowing = LISTS + "allows = { by = 'user_id', reasons = ['all'] }\n[rules.all]\nwhen = 'true'\n"
    suppressing = Content.read(written(tmp_path, allowing, blocked="value,reason,expiry\n7,,\n")).rules
    assert rewritten(suppressing).rules == suppressing
    outside = rules.model_copy(update={"lists": {"blocked": rules.lists["blocked"].model_copy(update={"file": "../b.csv"})}})
    with pytest.raises(RulesError, match="does not lie beside the rules"):
        rewritten(outside)
