"""Reference runtime: serves and validates an exported checkpoint (stage 4 of 4)."""
