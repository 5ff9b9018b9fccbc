"""The MiMo-V2 decoder, its published geometries and tensor names, and loading of checkpoints."""
