"""Kafka: finpro's topics, and one way to turn settings into the configuration of each client."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import pyarrow as pa
import tenacity
from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import KafkaError as ClientError
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from conf.errors import KafkaError, up_command
from conf.settings import Settings

ORDERS = "orders"
PROCESSED_ORDERS = "processed_orders"
FRAUD_ALERT = "fraud_alert"
ORDERS_DEAD_LETTER = "orders_dead_letter"
TOPICS = (ORDERS, PROCESSED_ORDERS, FRAUD_ALERT, ORDERS_DEAD_LETTER)
ORDER_OUTCOMES = "order_outcomes"  # what turned out, from others: screening neither needs nor sees it

# What a topic may not leave to the broker's defaults: each message counts, also one of a key that comes again. The time
# of an order is Kafka's own, since a producer's clock may be wrong.
_KEEPS_ALL = {"cleanup.policy": "delete"}
_KAFKAS_TIME = {"message.timestamp.type": "LogAppendTime"}

_MOST_MILLISECONDS = (2**63 - 1) // 1000

_WAIT_SECONDS = 30
_RESTARTS_SECONDS = 60  # a broker that does is away for so long at most
_ATTEMPTS, _ATTEMPT_SECONDS = 4, 2
_DEFAULT_MESSAGE_BYTES = 1_048_588

_UNREACHABLE = (
    "does not answer: is it running, and does it speak what FINPRO_KAFKA_SECURITY_PROTOCOL says?"
    f" `{up_command()}` starts the embedded one; FINPRO_KAFKA_BOOTSTRAP_SERVERS names your own"
)
_ADVICE = {
    ClientError._AUTHENTICATION: (
        "refused the login: correct FINPRO_KAFKA_USERNAME, FINPRO_KAFKA_PASSWORD or FINPRO_KAFKA_SASL_MECHANISM"
    ),
    ClientError._SSL: (
        "cannot be trusted: FINPRO_KAFKA_SSL_CA_LOCATION must name the authority that its certificate comes from, and the"
        " certificate must name the host"
    ),
    ClientError._INVALID_ARG: "cannot be asked: correct the FINPRO_KAFKA_ setting that the reason below is about",
}

# Options of Spark's Kafka source: what a transaction gave up was never sent.
READ_COMMITTED = {"kafka.isolation.level": "read_committed"}
# Options of Spark's Kafka source: large fetches for a backlog, and no long wait for more where there is none.
SOURCE_TUNING = READ_COMMITTED | {
    "kafka.fetch.max.wait.ms": "5",
    "kafka.max.poll.records": "5000",
    "kafka.max.partition.fetch.bytes": str(8 << 20),
    "kafka.fetch.max.bytes": str(100 << 20),
    "kafka.receive.buffer.bytes": str(4 << 20),
}


def librdkafka_config(settings: Settings) -> dict[str, Any]:
    """Connection settings for confluent-kafka."""
    config: dict[str, Any] = {
        "bootstrap.servers": settings.require("kafka_bootstrap_servers"),
        "security.protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_ssl_ca_location:
        config["ssl.ca.location"] = str(settings.kafka_ssl_ca_location)
    if _has_login(settings):
        config["sasl.mechanism"] = settings.require("kafka_sasl_mechanism")
        config["sasl.username"] = settings.require("kafka_username")
        config["sasl.password"] = settings.require("kafka_password")
    return config


def kafka_python_config(settings: Settings) -> dict[str, Any]:
    """Connection settings for kafka-python."""
    config: dict[str, Any] = {
        "bootstrap_servers": settings.require("kafka_bootstrap_servers").split(","),
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_ssl_ca_location:
        config["ssl_cafile"] = str(settings.kafka_ssl_ca_location)
    if _has_login(settings):
        config["sasl_mechanism"] = settings.require("kafka_sasl_mechanism")
        config["sasl_plain_username"] = settings.require("kafka_username")
        config["sasl_plain_password"] = settings.require("kafka_password")
    return config


def spark_config(settings: Settings) -> dict[str, str]:
    """Connection settings for Spark's Kafka source and sink."""
    config = {
        "kafka.bootstrap.servers": settings.require("kafka_bootstrap_servers"),
        "kafka.security.protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_ssl_ca_location:
        config["kafka.ssl.truststore.type"] = "PEM"
        config["kafka.ssl.truststore.location"] = str(settings.kafka_ssl_ca_location)
    if _has_login(settings):
        mechanism = settings.require("kafka_sasl_mechanism")
        module = "plain.PlainLoginModule" if mechanism == "PLAIN" else "scram.ScramLoginModule"
        user, password = (_jaas_quoted(settings.require(name)) for name in ("kafka_username", "kafka_password"))
        config["kafka.sasl.mechanism"] = mechanism
        config["kafka.sasl.jaas.config"] = (
            f"org.apache.kafka.common.security.{module} required username={user} password={password};"
        )
    return config


def _has_login(settings: Settings) -> bool:
    return settings.kafka_security_protocol.startswith("SASL_")


def _jaas_quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class TopicReader:
    """Reads ranges of one topic, without a consumer group to leave behind."""

    def __init__(self, config: dict[str, Any], topic: str) -> None:
        """`config` is of a librdkafka client, `topic` a full name."""
        self._topic = topic
        own = {"group.id": "finpro-reader", "enable.auto.commit": False, "enable.partition.eof": True, "log_level": 0}
        # A fetch at the end of a partition waits for more, half a second by default, and the next partition waits for it.
        self._consumer = Consumer(config | own | {"fetch.wait.max.ms": 10})

    def __enter__(self) -> "TopicReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def ends(self) -> dict[int, int]:
        """Partition → the offset that its next message will get.

        Raises:
            KafkaError: Kafka does not answer.
        """
        return {partition: end for partition, (_, end) in self.kept().items()}

    def kept(self) -> dict[int, tuple[int, int]]:
        """Partition → the first offset that Kafka still has, and the one that its next message will get.

        Raises:
            KafkaError: Kafka does not answer.
        """
        try:
            partitions = self._consumer.list_topics(self._topic, timeout=_WAIT_SECONDS).topics[self._topic].partitions
            return {partition: self._kept(partition) for partition in partitions}
        except KafkaException as error:
            raise KafkaError(f"Kafka did not answer about {self._topic}: {error.args[0].str()}") from error

    def _kept(self, partition: int) -> tuple[int, int]:
        place = TopicPartition(self._topic, partition)
        again = _retrying(_has_no_leader_yet, seconds=_WAIT_SECONDS, pause=0.1)
        first, end = again(lambda: self._consumer.get_watermark_offsets(place, timeout=_WAIT_SECONDS))
        return first, end

    def read(self, partition: int, first: int, end: int | None = None) -> list[Any]:
        """The records of a partition from offset `first` up to `end`, or to its present end: those that are committed.

        What a transaction gave up, and what Kafka itself notes of transactions, has offsets and is no record. Behind a
        transaction that is still open nothing can be read yet: there it ends.

        Raises:
            KafkaError: Kafka does not answer, or sends nothing for long.
        """
        end = self._kept(partition)[1] if end is None else end
        records: list[Any] = []
        if end <= first:
            return records
        self._consumer.assign([TopicPartition(self._topic, partition, first)])
        heard_at = time.monotonic()
        while True:
            missing = end - (records[-1].offset() + 1 if records else first)
            more = self._consumer.consume(min(missing, 10_000), timeout=0.1)  # or as soon as it has that many
            if more:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > _WAIT_SECONDS:
                raise KafkaError(f"Kafka sent nothing of {self._topic} partition {partition} for {_WAIT_SECONDS} s")
            for record in more:
                error = record.error()
                if error and error.code() == ClientError._PARTITION_EOF:
                    return records
                if error:
                    raise KafkaError(f"Kafka could not read {self._topic}: {error.str()}")
                offset = record.offset() or 0
                if offset < end:
                    records.append(record)
                if offset >= end - 1:
                    return records


def forgotten(settings: Settings, name: str, reached: Mapping[int, int]) -> str | None:
    """Which offsets beyond those `reached` (partition → offset) one of finpro's topics has no more; None where there are none.

    Raises:
        KafkaError: Kafka does not answer.
    """
    with TopicReader(librdkafka_config(settings), settings.topic(name)) as reader:
        kept = reader.kept()
    gone = [
        f"offsets {offset} to {kept[partition][0] - 1} of partition {partition}"
        for partition, offset in sorted(reached.items())
        if partition in kept and kept[partition][0] > offset
    ]
    return ", ".join(gone) or None


def as_messages(records: list[Any]) -> pa.RecordBatch:
    """Records of a client as Spark's Kafka source gives them: `contract.MESSAGE_COLUMNS`."""
    # What a producer gives may be any 64 bits, and beyond what 64 bits of microseconds hold.
    received = [min(max(record.timestamp()[1], -_MOST_MILLISECONDS), _MOST_MILLISECONDS) * 1000 for record in records]
    return pa.record_batch(
        {
            "topic": pa.array([record.topic() for record in records], pa.string()),
            "partition": pa.array([record.partition() for record in records], pa.int32()),
            "offset": pa.array([record.offset() for record in records], pa.int64()),
            "timestamp": pa.array(received, pa.timestamp("us", "UTC")),
            "value": pa.array([record.value() for record in records], pa.binary()),
        }
    )


def create_topics(settings: Settings, *, partitions: int = 4, replication: int = -1) -> list[str]:
    """Create those of finpro's topics that do not exist; returns their full names.

    `replication` -1 leaves it to the broker's default.

    Raises:
        KafkaError: the brokers cannot be reached or refuse.
    """
    existing = existing_topics(settings)
    missing = [settings.topic(name) for name in (*TOPICS, ORDER_OUTCOMES) if settings.topic(name) not in existing]
    if missing:
        admin = AdminClient(librdkafka_config(settings) | {"log_level": 0})
        wanted = [
            NewTopic(
                name,
                num_partitions=partitions,
                replication_factor=replication,
                config=_KEEPS_ALL | _KAFKAS_TIME if name == settings.topic(ORDERS) else _KEEPS_ALL,
            )
            for name in missing
        ]
        for name, done in admin.create_topics(wanted, operation_timeout=15).items():
            try:
                done.result(timeout=20)
            except KafkaException as error:
                if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                    raise KafkaError(f"Kafka would not create the topic {name}: {error.args[0].str()}") from error
    return missing


class OrdersKept(NamedTuple):
    """What is wrong with how Kafka keeps `orders`, and what to do about it; None where nothing is.

    Attributes:
        loses: it forgets orders.
        dates: their timestamps are the producers'.
    """

    loses: str | None = None
    dates: str | None = None


def orders_kept(settings: Settings) -> OrdersKept:
    """How Kafka keeps `orders`. A login that may not ask (DescribeConfigs) hears nothing, and is not kept from its work."""
    topic = settings.topic(ORDERS)
    admin = AdminClient(librdkafka_config(settings) | {"log_level": 0})
    asked = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)], request_timeout=_WAIT_SECONDS)
    try:
        (config,) = (answer.result() for answer in asked.values())
    except KafkaException:
        return OrdersKept()
    values = {name: str(config[name].value) for name in (*_KEEPS_ALL, *_KAFKAS_TIME) if name in config}
    return kept_by(topic, values)


def kept_by(topic: str, config: dict[str, str]) -> OrdersKept:
    """The same of a topic (a full name) that has this configuration."""
    alter = f"`kafka-configs.sh --bootstrap-server … --alter --entity-type topics --entity-name {topic} --add-config "
    loses = dates = None
    if "compact" in config.get("cleanup.policy", ""):
        loses = (
            f"Kafka's topic {topic} is compacted (cleanup.policy is {config['cleanup.policy']}): of orders with one key it"
            f" keeps the last, screened or not. {alter}cleanup.policy=delete` ends that; what is gone has to be sent again."
        )
    if config.get("message.timestamp.type") == "CreateTime":
        dates = (
            f"the timestamps of {topic} are its producers' (message.timestamp.type is CreateTime): where a clock is wrong, so"
            f" is which of two orders came first. {alter}message.timestamp.type=LogAppendTime` makes them Kafka's."
        )
    return OrdersKept(loses, dates)


def kept_for(settings: Settings) -> dict[str, timedelta | None]:
    """Full name of a topic of finpro's → how long Kafka keeps a message there at least; None is for ever.

    Topics that are not there are left out, and those that this login may not ask about (DescribeConfigs).

    Raises:
        KafkaError: the brokers cannot be reached.
    """
    there = sorted(set(map(settings.topic, (*TOPICS, ORDER_OUTCOMES))) & existing_topics(settings).keys())
    admin = AdminClient(librdkafka_config(settings) | {"log_level": 0})
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in there]
    kept: dict[str, timedelta | None] = {}
    for resource, answer in admin.describe_configs(resources, request_timeout=_WAIT_SECONDS).items() if there else ():
        with suppress(KafkaException):
            milliseconds = int(answer.result()["retention.ms"].value)
            kept[resource.name] = None if milliseconds < 0 else timedelta(milliseconds=min(milliseconds, _MOST_MILLISECONDS))
    return kept


def largest_message(settings: Settings, name: str) -> int:
    """The most bytes that one of finpro's topics takes in a message; Kafka's default where this login may not ask."""
    admin = AdminClient(librdkafka_config(settings) | {"log_level": 0})
    resource = ConfigResource(ResourceType.TOPIC, settings.topic(name))
    asked = admin.describe_configs([resource], request_timeout=_WAIT_SECONDS)
    try:
        (config,) = (answer.result() for answer in asked.values())
        return int(config["max.message.bytes"].value)
    except (KafkaException, KeyError):
        return _DEFAULT_MESSAGE_BYTES


def topic_id(settings: Settings, name: str) -> str:
    """The id that Kafka gave one of finpro's topics: another one once it has been deleted and created again.

    Raises:
        KafkaError: Kafka does not answer, or has no such topic.
    """
    return topic_ids(settings, name)()


def topic_ids(settings: Settings, name: str) -> Callable[[], str]:
    """Asks for the id of one of finpro's topics (see `topic_id`), again and again on one connection.

    A broker that restarts meanwhile is waited for, as Spark does.
    """
    topic = settings.topic(name)
    admin = AdminClient(librdkafka_config(settings) | {"log_level": 0})

    def ask_once() -> str:
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=_WAIT_SECONDS)
        return str(described[topic].result().topic_id)

    again = _retrying(_may_pass, seconds=_RESTARTS_SECONDS, pause=0.5)

    def ask() -> str:
        try:
            return again(ask_once)
        except KafkaException as error:
            raise KafkaError(f"Kafka did not answer about {topic}: {error.args[0].str()}") from error

    return ask


_LEADER_CHANGES = (
    ClientError.NOT_LEADER_FOR_PARTITION,
    ClientError.LEADER_NOT_AVAILABLE,
    ClientError.FENCED_LEADER_EPOCH,
    ClientError.UNKNOWN_LEADER_EPOCH,
)


def _has_no_leader_yet(error: BaseException) -> bool:
    """Whether a partition has just been made, or its leader has just gone: the client asks another broker then."""
    return isinstance(error, KafkaException) and error.args[0].code() in _LEADER_CHANGES


def _retrying(may_pass: Callable[[BaseException], bool], *, seconds: float, pause: float) -> tenacity.Retrying:
    """Asks Kafka again while that helps, for so long; then raises what came last."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_fixed(pause),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """Whether Kafka failed to answer, and did not refuse."""
    unheard = (ClientError._TRANSPORT, ClientError._TIMED_OUT, ClientError._ALL_BROKERS_DOWN, ClientError._RESOLVE)
    return isinstance(error, KafkaException) and error.args[0].code() in unheard


def existing_topics(settings: Settings) -> dict[str, int]:
    """The topics that this user can see, by name: how many partitions each has.

    Raises:
        KafkaError: no broker answers, its certificate is not trusted, or the login is refused; names the setting.
    """
    servers = settings.require("kafka_bootstrap_servers")
    seen: list[ClientError] = []
    config = librdkafka_config(settings) | {
        "socket.connection.setup.timeout.ms": 5000,
        "log_level": 0,
        "error_cb": seen.append,
    }
    try:
        return _topics(AdminClient(config), seen)
    except KafkaException as error:
        why = next(filter(_is_clear, seen), error.args[0])
        advice = _ADVICE.get(why.code(), _UNREACHABLE)
        hint = _wrapped_password(settings) if why.code() == ClientError._AUTHENTICATION else ""
        raise KafkaError(f"Kafka at {servers} {advice}{hint}.\n({why.str()})") from error


def _wrapped_password(settings: Settings) -> str:
    """What a password that was refused looks like: it may have quotes and `#` of its own, so nothing else says so."""
    password = settings.get("kafka_password") or ""
    if len(password) > 1 and password[0] == password[-1] and password[0] in "\"'":
        return "; the password has quotes around it, which count as a part of it"
    if " #" in password or password != password.strip():
        return "; the password ends in white space or in what looks like a comment, which count as a part of it"
    return ""


def _topics(client: AdminClient, seen: list[ClientError]) -> dict[str, int]:
    """The topics that a client is shown, in some attempts, but no more once what is `seen` makes another one useless."""

    def ask() -> dict[str, int]:
        try:
            topics = client.list_topics(timeout=_ATTEMPT_SECONDS).topics
            return {name: len(topic.partitions) for name, topic in topics.items()}
        finally:
            client.poll(0)  # calls back with what went wrong

    is_open = tenacity.retry_if_exception(lambda _: not any(map(_is_clear, seen)))
    return tenacity.Retrying(retry=is_open, stop=tenacity.stop_after_attempt(_ATTEMPTS), reraise=True)(ask)


def _is_clear(error: ClientError) -> bool:
    return error.code() in _ADVICE


def require_topics(settings: Settings, names: tuple[str, ...] = TOPICS) -> dict[str, int]:
    """Check that topics exist; how many partitions each has.

    Raises:
        KafkaError: one is missing, or Kafka does not answer.
    """
    existing = existing_topics(settings)
    missing = sorted({settings.topic(name) for name in names} - existing.keys())
    if missing:
        servers = settings.require("kafka_bootstrap_servers")
        hidden = f", or the login {settings.kafka_username} has no right on it" if _has_login(settings) else ""
        raise KafkaError(
            f"Kafka at {servers} has no topic {', '.join(missing)}{hidden}. `finpro migrate` creates finpro's topics; screening"
            " needs Read on orders and Write on the others."
        )
    return {name: existing[settings.topic(name)] for name in names}


def unread(progress: Any) -> int | None:
    """How many messages of the topic were unread when a query planned its last micro-batch; `progress` is Spark's own of it."""
    if not progress or not progress["sources"]:
        return None
    read, latest = (_offsets_of(progress["sources"][0][place]) for place in ("endOffset", "latestOffset"))
    return sum(end - read.get(partition, 0) for partition, end in latest.items())


def _offsets_of(source: str) -> dict[tuple[str, str], int]:
    """Offsets in Spark's progress by topic and partition; none where it knows none."""
    topics = json.loads(source) or {}
    return {(topic, partition): int(end) for topic, partitions in topics.items() for partition, end in partitions.items()}
