"""Model families whose folders the runtime reads."""
