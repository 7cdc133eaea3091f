"""Rules are put in force: those that were proposed, or those that were in force before; and which were, since when, by whom.

In force is what the rules file holds (`FINPRO_RULES`): a running `finpro screen` takes it up, and records in the lakehouse
since when. Who put it there and why is in Postgres (`streaming.rules.proposals`). A file that was changed by hand is in the
first record only.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, count
from pathlib import Path

from psycopg2.extensions import cursor as Cursor

from conf.errors import PromotionRefused, RulesError
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from streaming.rules.content import Content, rewritten
from streaming.rules.proposals import (
    Application,
    Promotion,
    Proposal,
    add_promotion,
    decide_alone,
    newest_promotion,
    promotions,
    proposal_of,
    record_of,
)
from streaming.rules.recorded import RulesInForce, recorded_without_spark, rules_at

_SKEW = timedelta(minutes=1)  # of the clocks of screening and of Postgres
_VERSION = re.compile(r"^version[ \t]*=.*$", re.MULTILINE)
_LONGEST_VERSION = 64


@dataclass(frozen=True)
class Version:
    """Rules that were in force, or were put there and never taken up.

    Attributes:
        since: when screening took them up; where it has not, when they were put in force.
        rules: what they say.
        promotion: by which command they came; None where their file was written by hand.
        taken_up: whether screening went by them.
    """

    since: datetime
    rules: FraudRules
    promotion: Promotion | None
    taken_up: bool


# --- what is in force ------------------------------------------------------------------------------------------------


def file_in_force(settings: Settings) -> Content | None:
    """What the rules file holds; None where there is none."""
    return Content.read(settings.rules) if settings.rules.exists() else None


def rules_in_force_now(settings: Settings, recorded: Sequence[RulesInForce]) -> FraudRules:
    """What the rules file says; where it cannot be used, what screening still goes by.

    Raises:
        RulesError: it cannot be used, and nothing was ever taken up.
    """
    try:
        return load_rules(settings.rules)
    except RulesError:
        if not recorded:
            raise
        return recorded[-1].rules


def require_own_version(rules: FraudRules, used: Iterable[FraudRules]) -> None:
    """Refuse rules whose version was used for others: screening would, once they are in force.

    Raises:
        RulesError: says that it was.
    """
    if any(other.version == rules.version and other != rules for other in used):
        raise RulesError(
            f"Rules version {rules.version} was used before with other contents: give the changed rules a new version. "
            "`finpro rules history` lists those that were used."
        )


# --- the history -----------------------------------------------------------------------------------------------------


def history(recorded: Sequence[RulesInForce], promoted: Sequence[Promotion]) -> list[Version]:
    """Every version that was in force or was put there, the oldest first.

    Each promotion is that of the first time after it that its rules were taken up: whoever writes a file by hand that was in
    force before did not promote it again.
    """
    left = {promotion.number: (promotion, promotion.content.rules) for promotion in promoted}
    found = []
    for entry in recorded:
        own = [
            number
            for number, (promotion, rules) in left.items()
            if rules == entry.rules and promotion.at - _SKEW <= entry.since
        ]
        promotion = left.pop(own[0])[0] if own else None
        found.append(Version(entry.since, entry.rules, promotion, taken_up=True))
    for promotion, rules in left.values():
        is_no_change = bool(recorded) and rules == rules_at(recorded, promotion.at)  # of comments and examples only
        found.append(Version(promotion.at, rules, promotion, taken_up=is_no_change))
    return sorted(found, key=lambda version: version.since)


def known_history(settings: Settings) -> list[Version]:
    """`history`, from the records.

    Raises:
        FinproError: a record cannot be read; says which and what to do.
    """
    with record_of(settings.require("postgres_dsn")) as cursor:
        promoted = promotions(cursor)
    return history(recorded_without_spark(settings), promoted)


def told(versions: Sequence[Version], applied: Sequence[Application] = ()) -> str:
    """A line for each version, the newest last: since when, which, by whom and why; and for each time one was applied."""
    if not versions:
        return "No rules were in force yet: `finpro screen` records those that it goes by."
    lines = [
        (version.since, version.rules.version, version.promotion.by if version.promotion else "-", _reason(version))
        for version in versions
    ]
    lines += [(one.at.astimezone(UTC), one.version, one.by, _of_before(one)) for one in applied]
    width, by_width = max(len(line[1]) for line in lines), max(len(line[2]) for line in lines)
    return "\n".join(
        f"{at:%Y-%m-%d %H:%M:%S} UTC  {version:<{width}}  {by:<{by_width}}  {text}" for at, version, by, text in sorted(lines)
    )


def _of_before(one: Application) -> str:
    until = f" until {one.until.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if one.until else ""
    left = f", {len(one.days_left):,} days left" if one.days_left else ""
    since = f"since {one.since.astimezone(UTC):%Y-%m-%d %H:%M:%S}{until} UTC"
    return f"(applied to {one.orders:,} orders of before, {since}{left}) {one.why}"


def _reason(version: Version) -> str:
    promotion = version.promotion
    if promotion is None:
        return "(the file was written by hand)"
    despite = f" (despite its limits: {promotion.despite})" if promotion.despite else ""
    return f"{promotion.why}{despite}{'' if version.taken_up else ' (not taken up by screening)'}"


def of_version(name: str, versions: Sequence[Version]) -> FraudRules:
    """The rules of a version of the history.

    Raises:
        RulesError: there is none of this name; names those that there are.
    """
    for version in versions:
        if version.rules.version == name:
            return version.rules
    known = ", ".join(dict.fromkeys(version.rules.version for version in versions)) or "none yet"
    raise RulesError(f"{name} is no version of the history: {known}.")


def of_version_or_file(name: str, versions: Sequence[Version]) -> FraudRules:
    """The rules of a version of the history, or else of a file.

    Raises:
        RulesError: there is neither, or the file cannot be used.
    """
    is_file = Path(name).is_file() and name not in {version.rules.version for version in versions}
    return load_rules(Path(name)) if is_file else of_version(name, versions)


# --- put in force ----------------------------------------------------------------------------------------------------


def promote(settings: Settings, path: Path, *, by: str, why: str, despite: str | None = None) -> str:
    """Put a file in force that was proposed exactly as it stands; returns its version.

    Args:
        settings: whose rules file is replaced.
        path: the file.
        by: who does it.
        why: the reason, kept in the record.
        despite: the reason to do it although it does not keep a limit that it was proposed with.

    Raises:
        PromotionRefused: it was not proposed, others were put in force meanwhile, or it does not keep a limit.
        RulesError: a file cannot be used or written.
        PostgresError: the record cannot be reached.
    """
    content = Content.read(path)
    with record_of(settings.require("postgres_dsn")) as cursor:
        decide_alone(cursor)
        proposal = _proposed(cursor, content, path)
        version = content.rules.version
        live = file_in_force(settings)
        if live == content:
            raise PromotionRefused(f"{path} is in force already: {settings.rules} holds the same.")
        if proposal.replaces != (live.fingerprint if live else "") or proposal.follows != newest_promotion(cursor):
            raise PromotionRefused(_stale(cursor, proposal, path))
        if proposal.failed and not despite:
            failed = "\n".join(f"  {limit}" for limit in proposal.failed)
            raise PromotionRefused(
                f"{path} was proposed, and does not keep its limits:\n{failed}\n"
                "Change it and propose it again; --despite REASON puts it in force all the same, and is kept in the record."
            )
        add_promotion(
            *(cursor, content, version),
            number=proposal.follows + 1,
            proposal=proposal.number,
            replaced=live,
            by=by,
            why=why,
            despite=despite if proposal.failed else None,
        )
        _replace(cursor, settings, content, live)
    return version


def revert(settings: Settings, to: str | None, *, by: str, why: str, version: str | None = None) -> tuple[str, str]:
    """Put the rules of the version before the present one, or of a named one, in force again, under a new version.

    Args:
        settings: whose rules file is replaced.
        to: a version of the history; None for the one before.
        by: who does it.
        why: the reason, kept in the record.
        version: the new version's name; by default that of the rules, with a number behind it.

    Returns:
        The version it goes back to, and the new one.

    Raises:
        RulesError: there is no such version, its new name was used before, or the file cannot be written.
        PromotionRefused: it is in force already.
        FinproError: a record cannot be read.
    """
    recorded = recorded_without_spark(settings)
    with record_of(settings.require("postgres_dsn")) as cursor:
        decide_alone(cursor)
        promoted = promotions(cursor)
        versions, live = history(recorded, promoted), file_in_force(settings)
        rules = of_version(to, versions) if to else _before(versions, promoted, live)
        if live and live == _file_of(rules, promoted):
            raise PromotionRefused(f"Version {rules.version} is in force already: {settings.rules} holds it.")
        used = {one.rules.version for one in versions}
        content = renamed(_file_of(rules, promoted), version or _free(rules.version, used))
        require_own_version(content.rules, (one.rules for one in versions))
        add_promotion(
            *(cursor, content, content.rules.version),
            number=newest_promotion(cursor) + 1,
            proposal=None,
            replaced=live,
            by=by,
            why=why,
            despite=None,
        )
        _replace(cursor, settings, content, live)
    return rules.version, content.rules.version


def _replace(cursor: Cursor, settings: Settings, content: Content, live: Content | None) -> None:
    """Put the file in the place of the one in force, and end the transaction; where it cannot be ended, put that one back."""
    content.write(settings.rules)
    try:
        cursor.connection.commit()
    except BaseException:
        if live:
            live.write(settings.rules)
        else:
            settings.rules.unlink()
        raise


def _proposed(cursor: Cursor, content: Content, path: Path) -> Proposal:
    proposal = proposal_of(cursor, content)
    if proposal is None:
        raise PromotionRefused(f"{path} was not proposed as it stands: `finpro rules propose {path}` tries it first.")
    return proposal


def _stale(cursor: Cursor, proposal: Proposal, path: Path) -> str:
    since = [promotion for promotion in promotions(cursor) if promotion.number > proposal.follows]
    what = (
        f"{since[-1].by} put version {since[-1].version} in force at {since[-1].at:%Y-%m-%d %H:%M:%S} UTC ({since[-1].why})"
        if since
        else "the file in force was changed by hand"
    )
    return f"Since {path} was proposed, {what}. Propose it again: `finpro rules propose {path}`."


def _before(versions: Sequence[Version], promoted: Sequence[Promotion], live: Content | None) -> FraudRules:
    """What the file in force has replaced; where that was not by a command, the newest rules that it does not hold itself."""
    newest = promoted[-1] if promoted else None
    if newest and newest.content == live and (replaced := _usable(newest.replaced)):
        return replaced
    in_force = _usable(live)
    for version in reversed(versions):
        if version.rules != in_force:
            return version.rules
    raise RulesError("No other rules were in force before: there is nothing to go back to.")


def _file_of(rules: FraudRules, promoted: Sequence[Promotion]) -> Content:
    """The file that said these rules, as somebody wrote it where it was kept."""
    kept = [content for one in reversed(promoted) for content in (one.content, one.replaced) if content]
    return next((content for content in kept if _usable(content) == rules), None) or rewritten(rules)


def _usable(content: Content | None) -> FraudRules | None:
    """What a file says; None where there is none, or one that was in force although it could not be used."""
    try:
        return content.rules if content else None
    except RulesError:
        return None


def _free(version: str, used: set[str]) -> str:
    """A name for the same rules again that nobody has used."""
    base = re.sub(r"-again\d*$", "", version)
    suffixes = chain(["-again"], (f"-again{number}" for number in count(2)))
    names = (f"{base[: _LONGEST_VERSION - len(suffix)]}{suffix}" for suffix in suffixes)
    return next(name for name in names if name not in used)


def renamed(content: Content, version: str) -> Content:
    """The same rules under another version: the same text where only its line has to change.

    Raises:
        RulesError: the name cannot be that of a version.
    """
    rules = content.rules.model_copy(update={"version": version})
    line = f"version = {json.dumps(version, ensure_ascii=False)}"
    changed = Content(_VERSION.sub(lambda _: line, content.text, count=1), content.beside)
    if changed.rules == rules:
        return changed
    return rewritten(rules)
