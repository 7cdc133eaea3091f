"""How a Spark job is started, runs as a service, makes itself known, and is told to stop.

Nothing here knows what a job does.
"""
