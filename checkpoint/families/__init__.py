"""Model families: one object each, and what every other model type of transformers gets."""
