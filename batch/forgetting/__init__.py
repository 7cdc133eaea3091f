"""A person's data outside of Postgres and the lakehouse: pseudonyms in the exported files, and in every table of BigQuery.

Each of it may be done again at any time, and then finds nothing left.
"""
