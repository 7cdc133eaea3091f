"""The containers on a real engine, as docs/containers.md runs them: `make containers`."""
