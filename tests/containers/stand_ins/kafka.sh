#!/bin/bash
# Starts a broker on the mounted configuration, or, where that cannot be read, on one that makes topics by itself: as the real
# image does.
set -eu
properties=/opt/kafka/config/server.properties
if [ -r /mnt/shared/config/server.properties ]; then
    cp /mnt/shared/config/server.properties "$properties"
else
    printf '%s\n' node.id=1 process.roles=broker,controller controller.listener.names=CONTROLLER \
        controller.quorum.voters=1@localhost:9093 listeners=PLAINTEXT://:9092,CONTROLLER://:9093 \
        advertised.listeners=PLAINTEXT://localhost:9092 log.dirs=/var/lib/kafka/data \
        listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT >"$properties"
fi
java() {
    "$JAVA_HOME/bin/java" ${KAFKA_HEAP_OPTS:-} -cp '/opt/kafka/libs/*' "$@"
}
java kafka.tools.StorageTool format --ignore-formatted --cluster-id=5L6g3nShT-eMCtK--X86sw --config="$properties"
exec "$JAVA_HOME/bin/java" ${KAFKA_HEAP_OPTS:-} -cp '/opt/kafka/libs/*' kafka.Kafka "$properties"
