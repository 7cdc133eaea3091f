"""The embedded platform: a real Kafka broker and a real Postgres under `.finpro/`, for one machine."""
