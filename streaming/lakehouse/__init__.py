"""The Delta lakehouse that keeps all history: its tables, how Kafka's topics get into them, and how they are kept in order.

Where the archive goes on after a lost checkpoint is read from the tables themselves.
"""
