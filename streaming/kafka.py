"""Kafka: finpro's topics, and one way to turn settings into the configuration of each client."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from conf.errors import KafkaError
from conf.settings import Settings

ORDERS = "orders"
PROCESSED_ORDERS = "processed_orders"
FRAUD_ALERT = "fraud_alert"
ORDERS_DEAD_LETTER = "orders_dead_letter"
TOPICS = (ORDERS, PROCESSED_ORDERS, FRAUD_ALERT, ORDERS_DEAD_LETTER)

_WAIT_SECONDS = 30

# Options of Spark's Kafka source: large fetches for a backlog, and no long wait for more where there is none.
SOURCE_TUNING = {
    "kafka.fetch.max.wait.ms": "5",
    "kafka.max.poll.records": "50000",
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
    if settings.kafka_sasl_mechanism:
        config["sasl.mechanism"] = settings.kafka_sasl_mechanism
        config["sasl.username"] = settings.require("kafka_username")
        config["sasl.password"] = settings.require("kafka_password")
    return config


def kafka_python_config(settings: Settings) -> dict[str, Any]:
    """Connection settings for kafka-python."""
    config: dict[str, Any] = {
        "bootstrap_servers": settings.require("kafka_bootstrap_servers").split(","),
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_sasl_mechanism:
        config["sasl_mechanism"] = settings.kafka_sasl_mechanism
        config["sasl_plain_username"] = settings.require("kafka_username")
        config["sasl_plain_password"] = settings.require("kafka_password")
    return config


def spark_config(settings: Settings) -> dict[str, str]:
    """Connection settings for Spark's Kafka source and sink."""
    config = {
        "kafka.bootstrap.servers": settings.require("kafka_bootstrap_servers"),
        "kafka.security.protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_sasl_mechanism:
        module = "plain.PlainLoginModule" if settings.kafka_sasl_mechanism == "PLAIN" else "scram.ScramLoginModule"
        user, password = (_jaas_quoted(settings.require(name)) for name in ("kafka_username", "kafka_password"))
        config["kafka.sasl.mechanism"] = settings.kafka_sasl_mechanism
        config["kafka.sasl.jaas.config"] = (
            f"org.apache.kafka.common.security.{module} required username={user} password={password};"
        )
    return config


def _jaas_quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class TopicReader:
    """Reads ranges of one topic, without a consumer group to leave behind."""

    def __init__(self, config: dict[str, Any], topic: str) -> None:
        """`config` is of a librdkafka client, `topic` a full name."""
        self._topic = topic
        self._consumer = Consumer(config | {"group.id": "finpro-reader", "enable.auto.commit": False, "log_level": 0})

    def __enter__(self) -> "TopicReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def ends(self) -> dict[int, int]:
        """Partition → the offset that its next message will get.

        Raises:
            KafkaError: Kafka does not answer.
        """
        try:
            partitions = self._consumer.list_topics(self._topic, timeout=_WAIT_SECONDS).topics[self._topic].partitions
            return {partition: self._end(partition) for partition in partitions}
        except KafkaException as error:
            raise KafkaError(f"Kafka did not answer about {self._topic}: {error.args[0].str()}") from error

    def _end(self, partition: int) -> int:
        return self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=_WAIT_SECONDS)[1]

    def read(self, partition: int, first: int, end: int | None = None) -> list[Any]:
        """The records of a partition from offset `first` up to `end`, or to its present end.

        Raises:
            KafkaError: Kafka does not answer, or sends nothing for long.
        """
        end = self._end(partition) if end is None else end
        records: list[Any] = []
        if end <= first:
            return records
        self._consumer.assign([TopicPartition(self._topic, partition, first)])
        while not records or records[-1].offset() < end - 1:
            missing = end - (records[-1].offset() + 1 if records else first)  # the call waits until it has that many
            more = self._consumer.consume(min(missing, 10_000), timeout=_WAIT_SECONDS)
            if not more:
                raise KafkaError(f"Kafka sent nothing of {self._topic} partition {partition} for {_WAIT_SECONDS} s")
            for error in filter(None, (record.error() for record in more)):
                raise KafkaError(f"Kafka could not read {self._topic}: {error.str()}")
            records += more
        return records


def as_messages(records: list[Any]) -> pa.RecordBatch:
    """Records of a client as Spark's Kafka source gives them: `contract.MESSAGE_COLUMNS`."""
    received = [datetime.fromtimestamp(record.timestamp()[1] / 1000, UTC) for record in records]
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
    missing = [settings.topic(name) for name in TOPICS if settings.topic(name) not in existing]
    if missing:
        admin = AdminClient(librdkafka_config(settings) | {"log_level": 0})
        wanted = [NewTopic(name, num_partitions=partitions, replication_factor=replication) for name in missing]
        for name, done in admin.create_topics(wanted, operation_timeout=15).items():
            try:
                done.result(timeout=20)
            except KafkaException as error:
                if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                    raise KafkaError(f"Kafka would not create the topic {name}: {error.args[0].str()}") from error
    return missing


def existing_topics(settings: Settings) -> set[str]:
    """The names of the topics that this user can see.

    Raises:
        KafkaError: no broker answers, or the login is refused.
    """
    servers = settings.require("kafka_bootstrap_servers")
    config = librdkafka_config(settings) | {
        "socket.connection.setup.timeout.ms": 5000,
        "log_level": 0,
    }
    try:
        return set(AdminClient(config).list_topics(timeout=8).topics)
    except KafkaException as error:
        raise KafkaError(
            f"Kafka at {servers} does not answer: is it running, and does the login fit? `finpro up` starts the embedded one;"
            f" FINPRO_KAFKA_BOOTSTRAP_SERVERS names your own.\n({error.args[0].str()})"
        ) from error


def require_topics(settings: Settings, names: tuple[str, ...] = TOPICS) -> None:
    """Check that topics exist.

    Raises:
        KafkaError: one is missing, or Kafka does not answer.
    """
    missing = sorted({settings.topic(name) for name in names} - existing_topics(settings))
    if missing:
        servers = settings.require("kafka_bootstrap_servers")
        raise KafkaError(f"Kafka at {servers} has no topic {', '.join(missing)}. `finpro migrate` creates finpro's topics.")
