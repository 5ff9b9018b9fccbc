"""The typed recipe, its loader, the recipes themselves and the embedded seed model."""
