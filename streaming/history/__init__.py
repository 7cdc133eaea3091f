"""The rules once more, over what the lakehouse holds: backtest, audit, the way back from bronze, rules of today on it.

By the same functions as the stream, so that what differs was the stream's fault.
"""
