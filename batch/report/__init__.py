"""The marts: from what they were built, and what they say, as one page that opens offline.

The page's parts serve the backtest's page as well.
"""
