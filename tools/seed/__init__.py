"""The embedded seed: a small trained MiMo-V2 model, its tokenizer, frozen text and prompts, and how they were made."""
