"""Scripts that make the repository's own data."""
