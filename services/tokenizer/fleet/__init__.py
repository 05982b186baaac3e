"""The line as it is now: what this tokenizer counts, and what the schedulers say of themselves and their executors."""
