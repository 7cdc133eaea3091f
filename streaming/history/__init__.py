"""The rules once more, over what the lakehouse holds: backtest, audit, and the way back from bronze.

By the same functions as the stream, so that what differs was the stream's fault.
"""
