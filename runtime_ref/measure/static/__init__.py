"""What a compiled kernel's machine code shows without a GPU."""
