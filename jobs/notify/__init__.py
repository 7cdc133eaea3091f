"""What Discord hears: the notices, and how they are sent without ever holding up who sends them.

`finpro notify`, `--notify`, and the DAGs' callbacks end here.
"""
