"""The CPU backend: a step in one call of compiled C."""
