"""From bytes to verdicts: the micro-batch of `finpro screen`, what it remembers, and where it writes.

`pipeline` is the way of an order through it; the other modules are its steps.
"""
