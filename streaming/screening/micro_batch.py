"""The driver's part of a micro-batch: what `foreachBatch` calls.

It opens the micro-batch in the ledger, has its messages screened, stored and announced by the workers, in one job, and settles
it. A micro-batch of more messages than the limit, planned when the limit was another one, is
screened in parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from pyspark.sql import DataFrame

from streaming.checkpoint import Checkpoint
from streaming.expressions import Expressions
from streaming.rules.live import LiveRules
from streaming.screening.division import By, Division
from streaming.screening.ledger import PARTS, Entry, Ledger, Ranges
from streaming.screening.pipeline import Screening, Stages, Told
from streaming.screening.receipts import NotKeyed, Receipt, summed
from streaming.screening.state import MicroBatch


@dataclass
class MicroBatches:
    """Screens one micro-batch after the other.

    Attributes:
        screening: what workers need to know.
        checkpoint: of the query.
        ledger: of the query.
        rules: those in force.
        topic_id: asks for the id of the topic as it is now.
        read: gives the messages of these ranges, where they are not all of a micro-batch.
        division: how products are divided.
        on_not_keyed: hears why orders are shuffled from now on.
        reports: hear what came of each part of a micro-batch.
    """

    screening: Screening
    checkpoint: Checkpoint
    ledger: Ledger
    rules: LiveRules
    topic_id: Callable[[], str]
    read: Callable[[Ranges], DataFrame]
    division: Division
    on_not_keyed: Callable[[str], None]
    reports: Sequence[Callable[[list[Receipt]], None]]
    _stages: Stages | None = field(default=None, init=False)
    _expressions: Expressions = field(default_factory=Expressions, init=False)

    def __call__(self, messages: DataFrame, number: int) -> None:
        """Screen a micro-batch; then Spark commits it.

        Raises:
            FinproError: it cannot go on; says why and what to do. Nothing is lost or doubled by then.
        """
        self.ledger.take(str(self.checkpoint.query_id()))
        ends, topic_id = self.checkpoint.ends(number), self.topic_id()
        with self.rules.fixed() as version:
            entry = self.ledger.open(number, ends, self.checkpoint.begins, topic_id, version)
        if entry.is_settled:  # before the driver died, just not committed by Spark
            return
        self._expressions.suit(messages.sparkSession, entry.offsets)
        parts = in_parts(entry.ranges, self.screening.backlog_offsets)
        receipts, states = [], 0
        for part, ranges in enumerate(parts):
            done = self._screen(messages if len(parts) == 1 else self.read(ranges), entry, part)
            if isinstance(done, NotKeyed):
                entry = self._shuffle(entry, part, done)
                done = self._screen(self.read(ranges), entry, part)
                assert not isinstance(done, NotKeyed)  # noqa: S101  which is said of partitions only
            states += sum(len(receipt.buckets) for receipt in done)
            receipts += done
            for report in self.reports:
                report(done)
        self.ledger.settle(entry, summed(receipts), states)

    def _screen(self, messages: DataFrame, entry: Entry, part: int) -> list[Receipt] | NotKeyed:
        """Screen, store and announce the messages of a part; the receipts of all tasks."""
        batch = self._batch(entry, part)
        moment = entry.moment + timedelta(microseconds=part)  # a later part may revise what an earlier one announced
        reports = self._stages_of(entry.rules_version).run(messages, Told(entry, batch, moment))
        if failed := next((report.failed for report in reports if report.failed), None):
            raise failed.as_error()
        if not_keyed := next((report.not_keyed for report in reports if report.not_keyed), None):
            return not_keyed
        return [report.receipt for report in reports if report.receipt]

    def _stages_of(self, rules_version: str) -> Stages:
        """The stages by which micro-batches of these rules are screened."""
        rules = self.rules.of_version(rules_version)
        if self._stages is None or self._stages.rules is not rules:
            self._stages = Stages(self.screening, rules)
        return self._stages

    def _shuffle(self, entry: Entry, part: int, not_keyed: NotKeyed) -> Entry:
        """From this part of a micro-batch on orders are shuffled by product."""
        self.on_not_keyed(not_keyed.why)
        again = self.ledger.reopen(entry, self._batch(entry, part).step)
        self.division = Division(By.PRODUCT, self.screening.tasks)
        return again

    def _batch(self, entry: Entry, part: int) -> MicroBatch:
        return MicroBatch(entry.query_id, self.division, entry.number, part)


def in_parts(ranges: Ranges, most: int | None) -> list[Ranges]:
    """Ranges of offsets as parts of at most so many offsets, or as many parts as there may be: each has its share of each.

    Spark itself may plan an offset a partition beyond its limit.
    """
    offsets = sum(end - first for first, end in ranges.values())
    count = min(-(-offsets // (most + len(ranges))), PARTS) if most else 1
    if count <= 1:
        return [ranges]
    return [
        {
            partition: (first + (end - first) * part // count, first + (end - first) * (part + 1) // count)
            for partition, (first, end) in ranges.items()
        }
        for part in range(count)
    ]
