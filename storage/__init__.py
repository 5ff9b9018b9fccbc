"""How files are read, written, locked, compared and named on a terminal: standard library only, imported by every room."""
