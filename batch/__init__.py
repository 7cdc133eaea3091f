"""Data at rest: reference data, Postgres access, export, warehouse load, reconciliation."""
