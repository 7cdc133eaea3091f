"""Running finpro and what it talks to, for the tests: commands, servers, clusters, and reading back what became of it."""
