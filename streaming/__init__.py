"""Orders as they flow: contract, producer, rules, screening, sinks."""
