"""Records into Kafka straight from the Arrow columns that hold them, without a Python object a record.

confluent-kafka takes dicts, and a worker spends more time on making these than on all else that sending needs. Its
librdkafka also takes an array of structs that say where each key and value lies: numpy makes that of the columns' offsets.
"""

import ctypes
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from confluent_kafka import KafkaError as ClientError
from confluent_kafka import cimpl

from conf.errors import KafkaError, KafkaRefused

_TIMEOUT_SECONDS = 30
# librdkafka waits in steps of 10 ms for reports, of which there are none where all goes well: to ask it anew each time is as
# cheap, and sees at once that the last record is there.
_POLL_MS, _FLUSH_MS = 10, 1
_PART = 10_000  # records that are handed over at once
_CONFIG = {
    "enable.idempotence": True,
    "acks": "all",
    "compression.type": "lz4",
    "linger.ms": 5,
    "batch.num.messages": 100_000,
    "queue.buffering.max.messages": 1_000_000,
    "queue.buffering.max.kbytes": 256 << 10,
    "message.timeout.ms": _TIMEOUT_SECONDS * 1000,
    "topic.metadata.propagation.max.ms": 10_000,  # a missing topic is told as such, before its records time out
    "delivery.report.only.error": True,
    "log_level": 2,
}
_RIGHTS = {
    ClientError.TOPIC_AUTHORIZATION_FAILED: "the login needs the right Write on this topic",
    ClientError.CLUSTER_AUTHORIZATION_FAILED: "the login needs the right Write on a topic, or IdempotentWrite",
}


# --- librdkafka: rdkafka.h in ctypes ---------------------------------------------------------------------------------

_MAJOR_VERSION = 2
_PRODUCER = 0
_COPY = 0x2
_ANY_PARTITION = -1
_PURGE_ALL = 0x1 | 0x2 | 0x4  # queued, in flight, without waiting
_MOST_MESSAGE_BYTES = 1_000_000_000


class _Message(ctypes.Structure):
    """`rd_kafka_message_t`."""

    _fields_ = (
        ("err", ctypes.c_int),
        ("topic", ctypes.c_void_p),
        ("partition", ctypes.c_int32),
        ("value", ctypes.c_void_p),
        ("value_size", ctypes.c_size_t),
        ("key", ctypes.c_void_p),
        ("key_size", ctypes.c_size_t),
        ("offset", ctypes.c_int64),
        ("private", ctypes.c_void_p),
    )


class _Memory(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Content(ctypes.Union):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("memory", _Memory), ("padding", ctypes.c_char * 64))


class _Argument(ctypes.Structure):
    """`rd_kafka_vu_t`: an argument of `rd_kafka_produceva`; `kind` is one of the numbers below."""

    _fields_ = (("kind", ctypes.c_int), ("content", _Content))


_TOPIC, _VALUE, _KEY, _FLAGS, _HEADERS = 2, 4, 5, 7, 10  # of `rd_kafka_vtype_t`

_OnDelivery = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(_Message), ctypes.c_void_p)
_OnError = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_Pointer, _Text, _Int, _Size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name → type of the result, types of the arguments
    "rd_kafka_version": (_Int,),
    "rd_kafka_err2str": (_Text, _Int),
    "rd_kafka_conf_new": (_Pointer,),
    "rd_kafka_conf_set": (_Int, _Pointer, _Text, _Text, _Text, _Size),
    "rd_kafka_conf_set_dr_msg_cb": (None, _Pointer, _OnDelivery),
    "rd_kafka_conf_set_error_cb": (None, _Pointer, _OnError),
    "rd_kafka_conf_destroy": (None, _Pointer),
    "rd_kafka_new": (_Pointer, _Int, _Pointer, _Text, _Size),
    "rd_kafka_topic_new": (_Pointer, _Pointer, _Text, _Pointer),
    "rd_kafka_topic_name": (_Text, _Pointer),
    "rd_kafka_topic_destroy": (None, _Pointer),
    "rd_kafka_produce_batch": (_Int, _Pointer, ctypes.c_int32, _Int, _Pointer, _Int),
    "rd_kafka_produceva": (_Pointer, _Pointer, _Pointer, _Size),
    "rd_kafka_headers_new": (_Pointer, _Size),
    "rd_kafka_header_add": (_Int, _Pointer, _Text, ctypes.c_ssize_t, _Text, ctypes.c_ssize_t),
    "rd_kafka_headers_destroy": (None, _Pointer),
    "rd_kafka_error_code": (_Int, _Pointer),
    "rd_kafka_error_destroy": (None, _Pointer),
    "rd_kafka_poll": (_Int, _Pointer, _Int),
    "rd_kafka_flush": (_Int, _Pointer, _Int),
    "rd_kafka_outq_len": (_Int, _Pointer),
    "rd_kafka_fatal_error": (_Int, _Pointer, _Text, _Size),
    "rd_kafka_purge": (_Int, _Pointer, _Int),
    "rd_kafka_destroy": (None, _Pointer),
}


@cache
def _librdkafka() -> ctypes.CDLL:
    """The librdkafka that confluent-kafka itself uses: what its module is linked to is found through it.

    Raises:
        KafkaError: there is none, or one that this module was not written for.
    """
    try:
        library = ctypes.CDLL(cimpl.__file__)
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        advice = "reinstall confluent-kafka, from a wheel"
        raise KafkaError(f"The librdkafka of {cimpl.__file__} cannot be called ({error}): {advice}.") from error
    version = library.rd_kafka_version()
    if version >> 24 != _MAJOR_VERSION:
        raise KafkaError(f"librdkafka is of version {version:#x}: finpro needs {_MAJOR_VERSION}.x. Reinstall confluent-kafka.")
    return library


# --- columns ---------------------------------------------------------------------------------------------------------

_IS_BYTES = (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string)
_NO_BYTES = ctypes.create_string_buffer(1)


def _as_bytes(column: pa.Array) -> pa.Array:
    """A column whose bytes lie one after the other, with offsets."""
    return column if any(is_kind(column.type) for is_kind in _IS_BYTES) else column.cast(pa.large_binary())


def _messages(keys: pa.Array, values: pa.Array) -> npt.NDArray[np.void]:
    """A `_Message` for each record: it points into the columns, which must outlive it."""
    messages = np.zeros(len(keys), np.dtype(_Message))
    messages["key"], messages["key_size"] = _places(keys)
    messages["value"], messages["value_size"] = _places(values)
    return messages


def _places(column: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The address of each value, 0 for null, and its size."""
    _, offsets, data = column.buffers()
    is_large = pa.types.is_large_binary(column.type) or pa.types.is_large_string(column.type)
    kind = np.dtype(np.int64 if is_large else np.int32)
    bounds = np.frombuffer(offsets, kind, len(column) + 1, column.offset * kind.itemsize).astype(np.int64)
    # An empty value is no null: it has an address, even where there is nothing at all.
    addresses = bounds[:-1] + (data.address if data is not None and data.size else ctypes.addressof(_NO_BYTES))
    sizes = np.diff(bounds)
    if column.null_count:
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        addresses[is_null], sizes[is_null] = 0, 0
    return addresses, sizes


# --- producer --------------------------------------------------------------------------------------------------------


class ColumnProducer:
    """An idempotent producer that takes columns. One a process, made after the process was forked; not for many threads.

    Its owner closes it, and makes another one after an error: see `is_broken`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Connects in the background.

        Args:
            config: of a librdkafka client; what it says stands before this module's own settings.

        Raises:
            KafkaError: librdkafka cannot be called, or refuses the configuration.
        """
        self._kafka = _librdkafka()
        self._servers = config["bootstrap.servers"]
        self._refused = 0
        self._first_refused = ("", 0)  # topic, error
        self._trouble = ""  # the last that was heard of a connection
        self._awaited: set[str] = set()  # topics
        self._topics: dict[str, int] = {}
        self._on_delivery, self._on_error = _OnDelivery(self._delivered), _OnError(self._heard)  # kept: C calls them
        self._is_broken = False
        self._client: int | None = self._started(_CONFIG | dict(config))

    @property
    def is_broken(self) -> bool:
        """Whether an error was raised, or `close` was called: records may be missing, and no more are taken."""
        return self._is_broken

    def send(self, topic: str, keys: pa.Array, values: pa.Array) -> None:
        """Hand records over, in their order; waits where the queue is full. `wait` tells whether the brokers have them.

        Args:
            topic: its full name.
            keys, values: as many of one as of the other, binary or text; either may be null.

        Raises:
            KafkaError: a record is refused, this one or one that was sent before.
        """
        keys, values = _matching(keys, values)
        handle = self._topic(topic)
        for start in range(0, len(keys), _PART):
            self._enqueue(topic, handle, _messages(keys.slice(start, _PART), values.slice(start, _PART)))

    def send_with_headers(
        self, topic: str, keys: pa.Array, values: pa.Array, headers: Sequence[Sequence[tuple[str, bytes]]]
    ) -> None:
        """As `send`, for few records that have headers: these one after the other, as names and values.

        Raises:
            KafkaError: a record is refused, this one or one that was sent before.
        """
        keys, values = _matching(keys, values)
        handle = self._topic(topic)
        for message, own in zip(_messages(keys, values), headers, strict=True):
            self._enqueue_one(topic, handle, message, own)

    def wait(self) -> None:
        """Wait until the brokers have all that was sent.

        Raises:
            KafkaError: a record was not taken, or there was no answer in time; names the topic and why.
        """
        self._require_usable()
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while self._kafka.rd_kafka_flush(self._client, _FLUSH_MS) and time.monotonic() < deadline:
            pass
        unsent = self._kafka.rd_kafka_outq_len(self._client)
        self._raise_refused(unsent)
        if unsent:
            self._fail(unsent, f"{', '.join(sorted(self._awaited))}: no answer within {_TIMEOUT_SECONDS} s{self._aside()}")
        self._awaited.clear()
        self._trouble = ""

    def close(self) -> None:
        """Give up what was not sent yet, and end the connections."""
        self._is_broken = True
        if self._client is None:
            return
        self._kafka.rd_kafka_purge(self._client, _PURGE_ALL)
        for handle in self._topics.values():
            self._kafka.rd_kafka_topic_destroy(handle)
        self._kafka.rd_kafka_destroy(self._client)
        self._client = None
        self._topics.clear()

    def _started(self, config: dict[str, Any]) -> int:
        # As large as the queue: so no message is one that there is never room for. How large one may be its topic says.
        most = min(int(config["queue.buffering.max.kbytes"]) << 10, _MOST_MESSAGE_BYTES)
        text = {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in ({"message.max.bytes": most} | config).items()
        }
        why = ctypes.create_string_buffer(512)
        settings = self._kafka.rd_kafka_conf_new()
        self._kafka.rd_kafka_conf_set_dr_msg_cb(settings, self._on_delivery)
        self._kafka.rd_kafka_conf_set_error_cb(settings, self._on_error)
        accepted = all(
            self._kafka.rd_kafka_conf_set(settings, name.encode(), value.encode(), why, len(why)) == 0
            for name, value in text.items()
        )
        client: int | None = self._kafka.rd_kafka_new(_PRODUCER, settings, why, len(why)) if accepted else None
        if client is None:
            self._kafka.rd_kafka_conf_destroy(settings)
            raise KafkaError(f"librdkafka refuses the configuration for Kafka at {self._servers}: {_text(why.value)}")
        return client

    def _topic(self, name: str) -> int:
        """The handle of a topic that is about to be sent to."""
        self._require_usable()
        self._awaited.add(name)
        if name not in self._topics:
            handle = self._kafka.rd_kafka_topic_new(self._client, name.encode(), None)
            if handle is None:
                self._fail(0, f"{name}: librdkafka does not take this name of a topic")
            self._topics[name] = handle
        return self._topics[name]

    def _enqueue(self, topic: str, handle: int, messages: npt.NDArray[np.void]) -> None:
        self._poll(0)
        while True:
            address = messages.ctypes.data
            taken = self._kafka.rd_kafka_produce_batch(handle, _ANY_PARTITION, _COPY, address, len(messages))
            if taken == len(messages):
                return
            errors = messages["err"]
            refused = errors[(errors != 0) & (errors != ClientError._QUEUE_FULL)]
            if len(refused):
                self._fail(len(refused), f"{topic}: {self._reason(int(refused[0]))}")
            messages = messages[taken:]  # once the queue is full it takes none of the rest
            self._poll(_POLL_MS)

    def _enqueue_one(self, topic: str, handle: int, message: np.void, headers: Sequence[tuple[str, bytes]]) -> None:
        key, value = (_Memory(int(message[name]), int(message[f"{name}_size"])) for name in ("key", "value"))
        listed = self._kafka.rd_kafka_headers_new(len(headers))
        try:
            for name, content in headers:
                self._kafka.rd_kafka_header_add(listed, name.encode(), -1, content, len(content))
            arguments = (_Argument * 5)(
                _Argument(_TOPIC, _Content(address=handle)),
                _Argument(_KEY, _Content(memory=key)),
                _Argument(_VALUE, _Content(memory=value)),
                _Argument(_FLAGS, _Content(flags=_COPY)),
                _Argument(_HEADERS, _Content(address=listed)),
            )
            self._poll(0)
            while code := self._produced(arguments):
                if code != ClientError._QUEUE_FULL:
                    self._fail(1, f"{topic}: {self._reason(code)}")
                self._poll(_POLL_MS)
        except KafkaError:
            self._kafka.rd_kafka_headers_destroy(listed)  # a record that is taken owns them
            raise

    def _produced(self, arguments: "ctypes.Array[_Argument]") -> int:
        """The error of `rd_kafka_produceva`; 0 where there is none."""
        error = self._kafka.rd_kafka_produceva(self._client, arguments, len(arguments))
        if error is None:
            return 0
        code = int(self._kafka.rd_kafka_error_code(error))
        self._kafka.rd_kafka_error_destroy(error)
        return code

    def _poll(self, timeout_ms: int) -> None:
        self._kafka.rd_kafka_poll(self._client, timeout_ms)
        self._raise_refused()

    def _delivered(self, _client: int, message: Any, _opaque: int) -> None:
        """A record was given up; of others nothing is reported."""
        error = message.contents.err
        if not error:
            return
        if not self._refused:
            self._first_refused = (_text(self._kafka.rd_kafka_topic_name(message.contents.topic)), error)
        self._refused += 1

    def _heard(self, _client: int, error: int, reason: bytes, _opaque: int) -> None:
        if error != ClientError._ALL_BROKERS_DOWN:  # says less than what was heard before
            self._trouble = _text(reason)

    def _raise_refused(self, unsent: int = 0) -> None:
        if self._refused:
            topic, error = self._first_refused
            self._fail(self._refused + unsent, f"{topic}: {self._fatal() or self._reason(error)}")
        if fatal := self._fatal():
            self._fail(unsent, f"{', '.join(sorted(self._awaited))}: {fatal}")

    def _fatal(self) -> str:
        """Why the client gave up for good, or nothing."""
        why = ctypes.create_string_buffer(512)
        error = self._kafka.rd_kafka_fatal_error(self._client, why, len(why))
        return _text(why.value) + _advice(error) if error else ""

    def _reason(self, error: int) -> str:
        if error == ClientError._FATAL:
            return self._fatal()
        about = self._aside() if error == ClientError._MSG_TIMED_OUT else _advice(error)
        return _text(self._kafka.rd_kafka_err2str(error)) + about

    def _aside(self) -> str:
        return f" ({self._trouble})" if self._trouble else ""

    def _require_usable(self) -> None:
        if self._is_broken:
            raise KafkaError(f"The producer of Kafka at {self._servers} has failed before, or is closed: make another one.")

    def _fail(self, records: int, why: str) -> NoReturn:
        self._is_broken = True
        kind = KafkaRefused if any(right in why for right in _RIGHTS.values()) else KafkaError
        raise kind(f"Kafka at {self._servers} did not take {records} records: {why}")


def _matching(keys: pa.Array, values: pa.Array) -> tuple[pa.Array, pa.Array]:
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys for {len(values)} values")
    return _as_bytes(keys), _as_bytes(values)


def _advice(error: int) -> str:
    return f": {_RIGHTS[error]}" if error in _RIGHTS else ""


def _text(content: bytes | None) -> str:
    return (content or b"").decode(errors="replace")
