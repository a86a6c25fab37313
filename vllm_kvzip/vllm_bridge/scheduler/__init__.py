"""The engine core: blocks are reserved, freed, and shared."""
