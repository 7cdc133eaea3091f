"""`finpro rules test`: the examples of a rules file, without any service."""

from pathlib import Path

from conf.errors import RulesError
from streaming.rules.examples import Outcome, try_examples


def tried(path: Path) -> str:
    """Try the examples of a rules file; returns what there is to say.

    Raises:
        RulesError: the file cannot be used, or an example got what it must not; names each.
    """
    outcomes = try_examples(path)
    failed = [outcome for outcome in outcomes if outcome.wrong]
    if failed:
        lines = "\n".join(f"  {_line(outcome)}" for outcome in failed)
        raise RulesError(f"{len(failed)} of {len(outcomes)} examples of {path} fail:\n{lines}")
    rules = len({outcome.rule for outcome in outcomes})
    return f"{len(outcomes)} examples of {rules} rules hold."


def _line(outcome: Outcome) -> str:
    orders = ", ".join(map(str, outcome.wrong))
    must = "must be hit and is not" if outcome.hit else "is hit and must not be"
    note = f" ({outcome.note})" if outcome.note else ""
    return f"{outcome.rule}, example {outcome.number}{note}: order {orders} {must}"
