"""Writing and verifying the FP4-DFlash Hugging Face checkpoint (stage 3 of 4)."""
