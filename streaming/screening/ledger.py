"""The ledger of screening: a row a micro-batch in Postgres, written before any of its orders is.

    take the query ─> open (number, epoch, moment, rules, topic, offsets) ─> tasks store, if it is still open ─> settle

The row that stands wins when a micro-batch is done again: so it has the time and the rules that it had. A task looks at the row
in the transaction that stores: so what comes late, from a driver that was replaced or an attempt that was given up, stores
nothing. And a micro-batch is opened only where the one before is settled, by this very driver's account: so a Postgres that has
lost commits, a checkpoint from a copy, or a topic made anew is noticed before anything is stored.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
from psycopg2.extensions import connection as Connection

from batch.arrow_sessions import ArrowCursor
from batch.postgres import begun, explained, open_connection, until_reachable
from conf.errors import FinproError, PostgresUnavailable, StreamingError
from streaming.checkpoint import Checkpoint, Ends
from streaming.screening.division import By

Ranges = dict[int, tuple[int, int]]  # partition → the first offset, and the one after the last

SIGN_OF_LIFE_SECONDS = 3.0
# A driver that has given no sign of life for so long may be replaced. Where it ran on this machine and is gone: at once.
LEASE_SECONDS = 15.0
# Parts of a micro-batch have numbers of their own, this many to a micro-batch: see `state`.
PARTS = 1024
_PRUNE_EVERY = 500  # micro-batches; then only the oldest rows are looked at, since a month has millions
# How long what is left of rules across products is kept that are no more, and evidence: longer than any order is remembered,
# which is the longest interval (a day) and `lateness`. Until then such rules go on where they were, should they come back.
_ACROSS_KEPT = timedelta(days=3)
_FORGET_ACROSS = """
    delete from screening_state where query_id = %(query)s and division in (
        select division from screening_state where query_id = %(query)s and starts_with(division, %(by)s)
        group by division having max(batch) < %(parts)s * (
            select max(number) from screening_ledger where query_id = %(query)s and moment < clock_timestamp() - %(keep)s))
"""

_START_ANEW = (
    "Move the checkpoint away and start anew, as docs/runbook.md says (the checkpoint of screening is lost): nothing is lost or"
    " doubled."
)


_Result = TypeVar("_Result")


class Entry(NamedTuple):
    """A row of the ledger, as the tasks of its micro-batch need it.

    Attributes:
        query_id: of the checkpoint.
        number: of the micro-batch.
        epoch: of the driver that has it.
        moment: the micro-batch's own time.
        since: what was stored from then on may not have been announced yet: the moment, or an earlier one, see `_Owed`.
        rules_version: what it is screened by.
        ranges: what it reads.
        is_settled: whether there is nothing left to do.
        is_again: whether it was begun before, perhaps with another limit of offsets.
    """

    query_id: str
    number: int
    epoch: int
    moment: datetime
    since: datetime
    rules_version: str
    ranges: Ranges
    is_settled: bool
    is_again: bool = False

    @property
    def offsets(self) -> int:
        """How many offsets it reads: messages, and what transactions leave between them."""
        return sum(end - first for first, end in self.ranges.values())


@dataclass(frozen=True)
class Driver:
    """Who screens: a process.

    Attributes:
        host: its name, for people.
        machine: tells this kernel, and what it shows of its processes, from all others.
        process: its id.
    """

    host: str
    machine: str
    process: int

    @classmethod
    def this(cls) -> "Driver":
        """This process."""
        boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        with suppress(OSError):
            return cls(socket.gethostname(), f"{boot.read_text().strip()}/{space.stat().st_ino}", os.getpid())
        return cls(socket.gethostname(), socket.gethostname(), os.getpid())


class _Holder(NamedTuple):
    """A row of screening_drivers."""

    epoch: int
    host: str
    machine: str
    process: int
    since: datetime
    seen_at: datetime
    silent_seconds: float

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"

    def is_gone(self, here: Driver) -> bool | None:
        """Whether that process has ended; None where that cannot be seen from here."""
        if self.machine != here.machine:
            return None
        if self.process == here.process:
            return True
        try:
            process = psutil.Process(self.process)
            return process.create_time() > self.since.timestamp() + 1 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class _Owed(NamedTuple):
    """What queries whose checkpoints were given up have stored and may not have announced.

    Attributes:
        since: when the first of them was stored, or later.
        ends: up to where they lie.
    """

    since: datetime
    ends: Ends

    @classmethod
    def of(cls, found: dict[str, Any] | None) -> "_Owed | None":
        """As a row has it."""
        return cls(datetime.fromisoformat(found["since"]), _offsets(found["ends"])) if found else None

    def as_json(self) -> str:
        """For a row."""
        return json.dumps({"since": self.since.isoformat(), "ends": self.ends})

    def is_paid(self, reached: Ends) -> bool:
        """Whether a query that has come so far has read all of it again."""
        return all(reached.get(partition, 0) >= end for partition, end in self.ends.items())


class _Row(NamedTuple):
    """A row of screening_ledger."""

    number: int
    moment: datetime
    rules_version: str
    topic_id: str
    first: Ends
    ends: Ends
    owed: _Owed | None
    is_settled: bool
    states: int | None


class Ledger:
    """The ledger of one query, and this process's claim to be its driver."""

    def __init__(
        self,
        dsn: str,
        checkpoint: str,
        driver: Driver | None = None,
        *,
        keep: timedelta = timedelta(days=30),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Nothing happens yet.

        Args:
            dsn: of Postgres.
            checkpoint: of the query, for people.
            driver: who drives; by default this process.
            keep: how long rows of settled micro-batches are kept.
            say: hears what is waited for.
        """
        self._dsn, self._checkpoint, self._driver = dsn, checkpoint, driver or Driver.this()
        self._keep, self._say = keep, say
        self._using = threading.Lock()
        self._connection: Connection | None = None
        self._query_id, self._epoch = "", 0
        self._ended = threading.Event()
        self._lost: FinproError | None = None

    # --- one driver at a time ----------------------------------------------------------------------------------------

    def take(self, query_id: str) -> None:
        """Become the driver of a query; nothing where this process is it.

        Waits while its last driver may still be at work elsewhere.

        Raises:
            StreamingError: it has a driver, which is named.
            PostgresError: Postgres does not answer, or refuses.
        """
        if self._query_id == query_id:
            return
        seen_at = None
        while holder := self._try_to_take(query_id):
            if holder.is_gone(self._driver) is False or seen_at not in (None, holder.seen_at):
                raise StreamingError(
                    f"The checkpoint {self._checkpoint} is being screened from already, by {holder}. Stop that one first, or"
                    " give this one a checkpoint of its own (FINPRO_CHECKPOINTS)."
                )
            if seen_at is None:
                self._say(f"waits up to {LEASE_SECONDS:.0f} s for signs of life of the checkpoint's last driver, {holder}")
            seen_at = holder.seen_at
            time.sleep(0.5)
        threading.Thread(target=self._give_signs_of_life, name="ledger", daemon=True).start()

    def _try_to_take(self, query_id: str) -> _Holder | None:
        """Become the driver, or else who is."""

        def work(cursor: Any) -> _Holder | int:
            cursor.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"finpro screen {query_id}"])
            holder = _holder(cursor, query_id)
            if holder and holder.silent_seconds < LEASE_SECONDS and holder.is_gone(self._driver) is not True:
                return holder
            epoch = holder.epoch + 1 if holder else 1
            cursor.execute(
                "insert into screening_drivers values (%(query)s, %(epoch)s, %(host)s, %(machine)s, %(process)s,"
                " clock_timestamp(), clock_timestamp(), %(checkpoint)s)"
                " on conflict (query_id) do update set epoch = excluded.epoch, host = excluded.host,"
                " machine = excluded.machine, process = excluded.process, since = excluded.since, seen_at = excluded.seen_at,"
                " checkpoint = excluded.checkpoint",
                {"query": query_id, "epoch": epoch, "checkpoint": self._checkpoint, **vars(self._driver)},
            )
            return epoch

        done = self._do(work)
        if isinstance(done, _Holder):
            return done
        self._query_id, self._epoch = query_id, done
        return None

    def _give_signs_of_life(self) -> None:
        def work(cursor: Any) -> None:
            cursor.execute(
                "update screening_drivers set seen_at = clock_timestamp() where query_id = %s and epoch = %s",
                [self._query_id, self._epoch],
            )
            if not cursor.rowcount:
                raise self._replaced(cursor)

        while not self._ended.wait(SIGN_OF_LIFE_SECONDS):
            try:
                self._do(work, patience=0)  # whoever stores has more, and needs the connection
            except PostgresUnavailable:
                continue
            except FinproError as error:
                self._lost = error
                return

    def require_held(self) -> None:
        """Check that this process is still the driver, as far as it knows.

        Raises:
            StreamingError: another one is.
        """
        if self._lost:
            raise self._lost

    def close(self) -> None:
        """Let the query go, so that the next driver need not wait; never fails."""
        self._ended.set()
        release = "update screening_drivers set seen_at = '-infinity' where query_id = %s and epoch = %s"
        if self._using.acquire(timeout=2):  # else Postgres is silent, and whoever waits for it has the connection
            self._using.release()
            with suppress(FinproError):
                if self._query_id:
                    self._do(lambda cursor: cursor.execute(release, [self._query_id, self._epoch]), patience=0)
            if self._connection:
                self._connection.close()

    def _replaced(self, cursor: Any) -> StreamingError:
        holder = _holder(cursor, self._query_id)
        if holder is None:
            return StreamingError(f"Postgres no longer knows who screens from {self._checkpoint}: {LOST_COMMITS}")
        if holder.epoch < self._epoch:
            return StreamingError(f"Postgres holds an older driver of {self._checkpoint} than this one: {LOST_COMMITS}")
        return StreamingError(
            f"The checkpoint {self._checkpoint} has another driver since: {holder}. This one was not heard of for"
            f" {LEASE_SECONDS:.0f} s, stores nothing any more, and ends."
        )

    # --- rows --------------------------------------------------------------------------------------------------------

    def require_continues(self, checkpoint: Checkpoint, topic_id: str) -> Ends | None:
        """Check that a checkpoint goes on where the ledger does, before a query starts: the first offsets that it will read.

        Args:
            checkpoint: of the query.
            topic_id: of the topic as it is now.

        Returns:
            partition → offset; None in a new checkpoint.

        Raises:
            StreamingError: the one is older or newer than the other, or the topic is another one; says what to do.
            PostgresError: Postgres does not answer, or refuses.
        """
        query_id = checkpoint.query_id()
        if query_id is None:
            if checkpoint.planned() is not None:
                raise StreamingError(f"The checkpoint lacks the file {checkpoint.folder}/metadata. {_START_ANEW}")
            return None
        self.take(query_id)  # first: as long as another driver has it, the checkpoint changes
        planned, committed = checkpoint.planned(), checkpoint.committed()

        def work(cursor: Any) -> tuple[_Row | None, int]:
            _, newest = self._look(cursor)
            if newest and not newest.topic_id:
                newest = self._adopted(cursor, newest, checkpoint, committed, topic_id)
            return newest, _states(cursor, query_id, newest.number) if newest else 0

        newest, states = self._do(work)
        reached = "nothing" if newest is None else f"micro-batch {newest.number}"
        if planned is None or committed is None:
            if newest and (planned is None or newest.number != planned.batch):
                raise StreamingError(
                    f"The checkpoint {checkpoint.folder} has no complete micro-batch, and the ledger in Postgres has"
                    f" {reached}: was it restored from a copy? {_START_ANEW}"
                )
        elif newest is None or newest.number < committed or (newest.number == committed and not newest.is_settled):
            raise StreamingError(
                f"The checkpoint {checkpoint.folder} has micro-batch {committed} complete, and the ledger in Postgres holds"
                f" {reached}{' unsettled' if newest and newest.number == committed else ''}: {LOST_COMMITS}"
            )
        elif newest.number > planned.batch or (newest.number == committed and newest.ends != checkpoint.ends(committed)):
            raise StreamingError(
                f"The checkpoint {checkpoint.folder} has micro-batch {planned.batch}, and the ledger in Postgres {reached},"
                f" with other offsets: the checkpoint is older, as if it were restored from a copy. {_START_ANEW}"
            )
        if newest is None:
            return None
        if newest.is_settled and newest.states not in (None, states):
            raise StreamingError(
                f"screening_state in Postgres holds {states} rows of micro-batch {newest.number}, and should hold"
                f" {newest.states}: {LOST_COMMITS}"
            )
        _require_topic(newest.topic_id, topic_id)
        return newest.ends if newest.is_settled else newest.first

    def reached(self) -> Ends:
        """From which offsets the next micro-batch reads, as far as is known.

        Raises:
            PostgresError: Postgres does not answer, or refuses.
        """
        _, newest = self._do(self._look)
        return {} if newest is None else newest.ends if newest.is_settled else newest.first

    def require_topic(self, topic_id: str) -> None:
        """Check that the topic is the one that was screened last.

        Args:
            topic_id: of the topic as it is now.

        Raises:
            StreamingError: it was deleted and created again since; says what to do.
            PostgresError: Postgres does not answer, or refuses.
        """
        _, newest = self._do(self._look)
        if newest and newest.topic_id:
            _require_topic(newest.topic_id, topic_id)

    def open(self, number: int, ends: Ends, begins: Callable[[], Ends], topic_id: str, rules_version: str) -> Entry:
        """Write the row of a micro-batch, or take up the one that stands.

        What is there already, because the micro-batch is done again, keeps its moment and rules. Where Spark planned it anew,
        and further, it is opened again as it is planned now.

        Args:
            number: Spark's.
            ends: partition → the offset after its last message.
            begins: gives partition → its first offset, asked only for the first micro-batch.
            topic_id: of the topic as it is now.
            rules_version: in force now.

        Raises:
            StreamingError: this is not the driver, or the ledger does not go on here; nothing was written.
            PostgresError: Postgres does not answer, or refuses.
        """

        def work(cursor: Any) -> Entry:
            is_driver, newest = self._look(cursor)
            if not is_driver:
                raise self._replaced(cursor)
            if newest:
                _require_topic(newest.topic_id, topic_id)
            if newest and newest.number == number:
                return self._again(cursor, newest, ends, rules_version)
            if newest is None and number == 0:
                first = begins()
            elif newest and newest.number == number - 1 and newest.is_settled:
                first = newest.ends
            else:
                raise StreamingError(
                    f"Micro-batch {number} is to be screened, and the ledger in Postgres holds"
                    f" {f'micro-batch {newest.number}' if newest else 'nothing'}: {LOST_COMMITS}"
                )
            first = {partition: first.get(partition, 0) for partition in ends}  # a new partition is read from its start
            moment = datetime.now(UTC)
            if newest and newest.moment >= moment:  # a clock was put back; who reads verdicts goes by this time
                moment = newest.moment + timedelta(microseconds=PARTS)
            owed = newest.owed if newest else self._owed_by_others(cursor, topic_id)
            if owed and owed.is_paid(first):
                owed = None
            cursor.execute(
                "insert into screening_ledger"
                " (query_id, number, epoch, moment, rules_version, topic_id, first_offsets, end_offsets, owed)"
                " values (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                [
                    *(self._query_id, number, self._epoch, moment, rules_version, topic_id),
                    *(json.dumps(first), json.dumps(ends), owed.as_json() if owed else None),
                ],
            )
            since, ranges = _since(owed, moment), _ranges(first, ends)
            return Entry(self._query_id, number, self._epoch, moment, since, rules_version, ranges, is_settled=False)

        return self._do(work)

    def _again(self, cursor: Any, row: _Row, ends: Ends, rules_version: str) -> Entry:
        """Take up the row of a micro-batch that is done again. (One from before the ledger does not say by which rules.)"""
        if any(ends.get(partition, -1) < end for partition, end in row.ends.items()):
            raise StreamingError(
                f"Micro-batch {row.number} goes up to {ends}, and went up to {row.ends} as the ledger in Postgres says: the"
                f" checkpoint is older, as if it were restored from a copy. {_START_ANEW}"
            )
        rules_version = row.rules_version or rules_version
        is_settled = row.is_settled and ends == row.ends
        first = {partition: row.first.get(partition, 0) for partition in ends}
        if not is_settled:
            cursor.execute(
                "update screening_ledger set epoch = %s, rules_version = %s, first_offsets = %s, end_offsets = %s,"
                " settled_at = null, counts = null where query_id = %s and number = %s",
                [self._epoch, rules_version, json.dumps(first), json.dumps(ends), self._query_id, row.number],
            )
            # It may be divided in another way now; what it goes on from stands until the next one is.
            cursor.execute(
                "delete from screening_state where query_id = %s and batch >= %s", [self._query_id, row.number * PARTS]
            )
        since, ranges = _since(row.owed, row.moment), _ranges(first, ends)
        return Entry(
            *(self._query_id, row.number, self._epoch, row.moment, since, rules_version, ranges),
            is_settled=is_settled,
            is_again=True,
        )

    def _owed_by_others(self, cursor: Any, topic_id: str) -> _Owed | None:
        """What other queries have left unsettled of the topic: the newest row of each may be."""
        cursor.execute(
            "select moment, end_offsets from screening_drivers as driver cross join lateral ("
            "   select * from screening_ledger where query_id = driver.query_id order by number desc limit 1) as newest"
            " where settled_at is null and driver.query_id <> %s and topic_id = %s and isfinite(moment)",
            [self._query_id, topic_id],
        )
        if not (left := cursor.fetchall()):
            return None
        ends: Ends = {}
        for _, offsets in left:
            ends |= {partition: max(end, ends.get(partition, 0)) for partition, end in _offsets(offsets).items()}
        return _Owed(min(moment for moment, _ in left).astimezone(UTC), ends)

    def settle(self, entry: Entry, counts: dict[str, Any], states: int) -> None:
        """Note that all of a micro-batch is stored and announced, and what it came to.

        Args:
            entry: its row.
            counts: for people.
            states: how many rows of `screening_state` its tasks have written.

        Raises:
            StreamingError: the row, or what tasks have stored, is gone; or this is not the driver any more.
            PostgresError: Postgres does not answer, or refuses.
        """

        def work(cursor: Any) -> None:
            cursor.execute(
                "with mine as (select from screening_drivers where query_id = %(query)s and epoch = %(epoch)s for share)"
                " update screening_ledger set settled_at = clock_timestamp(), states = %(states)s, counts = %(counts)s"
                " where query_id = %(query)s and number = %(number)s and epoch = %(epoch)s and exists (select from mine)"
                " and %(states)s = (select count(*) from screening_state where query_id = %(query)s"
                " and batch between %(first)s and %(last)s)",
                {
                    "query": entry.query_id,
                    "number": entry.number,
                    "epoch": entry.epoch,
                    "states": states,
                    "counts": json.dumps(counts),
                    "first": entry.number * PARTS,
                    "last": entry.number * PARTS + PARTS - 1,
                },
            )
            if not cursor.rowcount:
                if not self._look(cursor)[0]:
                    raise self._replaced(cursor)
                raise StreamingError(f"What micro-batch {entry.number} has stored is gone from Postgres: {LOST_COMMITS}")
            if entry.number % _PRUNE_EVERY == 0:
                cursor.execute("delete from screening_evidence where noted_at < clock_timestamp() - %s", [_ACROSS_KEPT])
                cursor.execute(
                    _FORGET_ACROSS, {"query": entry.query_id, "by": f"{By.FIELD} ", "parts": PARTS, "keep": _ACROSS_KEPT}
                )
                cursor.execute(
                    "delete from screening_ledger where query_id = %(query)s and number < %(number)s"
                    " and settled_at < clock_timestamp() - %(keep)s and number <= ("
                    "   select max(number) from (select number from screening_ledger where query_id = %(query)s"
                    "   order by number limit %(most)s) as oldest)",
                    {"query": entry.query_id, "number": entry.number, "keep": self._keep, "most": 4 * _PRUNE_EVERY},
                )

        self._do(work)

    def reopen(self, entry: Entry, step: int) -> Entry:
        """Forget what tasks have stored of the state after a step of this micro-batch: it will be divided in another way.

        The driver begins a new epoch with it: a task of a machine that was given up may still be at work, and divides in the
        former way.

        Raises:
            StreamingError: this is not the driver any more.
            PostgresError: Postgres does not answer, or refuses.
        """
        before, now = entry.epoch, entry.epoch + 1

        def work(cursor: Any) -> None:
            cursor.execute(
                "update screening_drivers set epoch = %(now)s where query_id = %(query)s"
                " and epoch in (%(before)s, %(now)s) and machine = %(machine)s and process = %(process)s",
                {"query": entry.query_id, "before": before, "now": now, **vars(self._driver)},
            )
            if not cursor.rowcount:
                raise self._replaced(cursor)
            cursor.execute(
                "update screening_ledger set epoch = %s where query_id = %s and number = %s and epoch = %s",
                [now, entry.query_id, entry.number, before],
            )
            cursor.execute("delete from screening_state where query_id = %s and batch = %s", [entry.query_id, step])

        self._do(work, epoch=now)
        return entry._replace(epoch=now)

    def _look(self, cursor: Any) -> tuple[bool, _Row | None]:
        """Whether this process is the driver, which it then stays until the transaction ends, and the newest row."""
        cursor.execute(
            "with mine as (select epoch from screening_drivers where query_id = %(query)s and epoch = %(epoch)s for share)"
            " select mine.epoch is not null, number, case when isfinite(moment) then moment else to_timestamp(0) end,"
            " rules_version, topic_id, first_offsets, end_offsets, owed, settled_at is not null, states"
            " from (select) as one left join mine on true"
            " left join (select * from screening_ledger where query_id = %(query)s order by number desc limit 1) as newest"
            " on true",
            {"query": self._query_id, "epoch": self._epoch},
        )
        is_driver, number, moment, rules_version, topic_id, first, ends, owed, *rest = cursor.fetchone()
        if number is None:
            return is_driver, None
        moment, first, ends = moment.astimezone(UTC), _offsets(first), _offsets(ends)
        row = _Row(number, moment, rules_version, topic_id, first, ends, _Owed.of(owed), *rest)
        return is_driver, row

    def _adopted(self, cursor: Any, row: _Row, checkpoint: Checkpoint, committed: int | None, topic_id: str) -> _Row:
        """Complete the row that a checkpoint from before there was a ledger was given."""
        ends = checkpoint.ends(row.number)
        first = checkpoint.ends(row.number - 1) if row.number else checkpoint.begins()
        moment = datetime.fromtimestamp(checkpoint.planned_at_ms(row.number) / 1000, UTC)
        is_settled = committed is not None and committed >= row.number
        cursor.execute(
            "update screening_ledger set topic_id = %s, first_offsets = %s, end_offsets = %s, moment = %s,"
            " settled_at = case when %s then settled_at end where query_id = %s and number = %s",
            [topic_id, json.dumps(first), json.dumps(ends), moment, is_settled, self._query_id, row.number],
        )
        return row._replace(topic_id=topic_id, first=first, ends=ends, moment=moment, is_settled=is_settled)

    # --- the connection ----------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[Any], _Result], *, patience: float = 60, epoch: int | None = None) -> _Result:
        """Do `work` with a cursor in one transaction; again on a new connection where Postgres has ended this one.

        It may have been committed by then: all that is done here may be done twice. Where an `epoch` is given, the driver has
        that one afterwards.
        """

        def attempt() -> _Result:
            try:
                with explained(self._dsn), self._connected() as connection, connection.cursor() as cursor:
                    begun(cursor)
                    return work(cursor)
            except PostgresUnavailable:
                self._forget()
                raise

        with self._using:
            done = until_reachable(attempt, seconds=patience)
            self._epoch = epoch or self._epoch
            return done

    def _connected(self) -> Connection:
        self._connection = self._connection or open_connection(self._dsn, application_name="finpro screen")
        return self._connection

    def _forget(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None


LOST_COMMITS = f"has Postgres lost what was committed, or been restored from a copy? {_START_ANEW}"


def _states(cursor: Any, query_id: str, number: int) -> int:
    """How many rows of `screening_state` a micro-batch has written."""
    cursor.execute(
        "select count(*) from screening_state where query_id = %s and batch between %s and %s",
        [query_id, number * PARTS, number * PARTS + PARTS - 1],
    )
    return int(cursor.fetchone()[0])


def _offsets(found: dict[str, int]) -> Ends:
    return {int(partition): offset for partition, offset in found.items()}


def _since(owed: _Owed | None, moment: datetime) -> datetime:
    return min(owed.since, moment) if owed else moment


def _ranges(first: Ends, ends: Ends) -> Ranges:
    return {partition: (first[partition], end) for partition, end in ends.items()}


def _holder(cursor: Any, query_id: str) -> _Holder | None:
    cursor.execute(
        "select epoch, host, machine, process, since, greatest(seen_at, 'epoch'),"
        " extract(epoch from clock_timestamp() - greatest(seen_at, 'epoch'))"
        " from screening_drivers where query_id = %s",
        [query_id],
    )
    row = cursor.fetchone()
    return _Holder(*row) if row else None


def _require_topic(known: str, now: str) -> None:
    if known != now:
        raise StreamingError(
            "The topic orders was deleted and created again since it was screened: its offsets now stand for other messages."
            f" {_START_ANEW}"
        )


# --- in tasks --------------------------------------------------------------------------------------------------------

_OPEN = """
    select 1 from screening_ledger
    where query_id = $1 and number = $2::bigint and epoch = $3::bigint and settled_at is null for share
"""
_WHY_NOT = """
    select ledger.epoch, driver.epoch, driver.host, driver.process
    from (select $1::text as query_id) as asked
    left join screening_ledger as ledger on ledger.query_id = asked.query_id and ledger.number = $2::bigint
    left join screening_drivers as driver on driver.query_id = asked.query_id
"""


def require_open(cursor: ArrowCursor, entry: Entry) -> None:
    """Check in a task's transaction that its micro-batch is open, and stays so until the transaction ends.

    Raises:
        StreamingError: it is not: says why. The transaction has to be given up.
    """
    place = (entry.query_id, str(entry.number), str(entry.epoch))
    if cursor.rows(_OPEN, place):
        return
    ((of_ledger, of_driver, host, process),) = cursor.rows(_WHY_NOT, place[:2])
    if of_ledger is None:
        raise StreamingError(f"Postgres holds no row of micro-batch {entry.number} in screening_ledger: {LOST_COMMITS}")
    if of_driver == entry.epoch:
        raise StreamingError(f"Micro-batch {entry.number} was settled by another attempt: this one stores nothing.")
    raise StreamingError(
        f"Process {process} on {host} has gone on with micro-batch {entry.number} in the meantime: this one stores nothing."
    )
