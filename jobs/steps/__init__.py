"""Steps of one long command, side by side on one machine: what waits for what, how they are shown, how they end together.

Nothing here knows what a step does.
"""
