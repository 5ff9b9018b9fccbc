"""Training of the DFlash drafter against the quantized target (stage 2 of 4)."""
