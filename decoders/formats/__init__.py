"""What the loader and the tokenizer know of the world: one thing a file."""
