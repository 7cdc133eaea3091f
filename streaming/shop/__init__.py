"""Made-up orders on their way to Kafka, and the account of what became of them.

The demo and the tests send these; the platform itself needs none of it.
"""
