"""From Postgres to BigQuery's raw tables: export on one snapshot, load, and the proof that both sides agree.

A run's manifest, in Cloud Storage, is what these steps know of each other.
"""
