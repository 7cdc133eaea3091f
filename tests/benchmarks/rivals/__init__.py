"""Who runs beside finpro: the process one would write instead, the floor, the tools that export; each a command."""
