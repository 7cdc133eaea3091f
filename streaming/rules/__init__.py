"""The rules over tables of orders, in columns; which rules are in force now, and which were when.

Nothing here knows of Kafka, Postgres or a micro-batch.
"""
