"""From a checkpoint folder to one rank's tensors."""
