"""Airflow over finpro: the server of one machine, what all DAGs share, how tasks run Spark, and who is told.

The DAGs themselves are in jobs/dags.
"""
