"""Benchmarks: the engine alone, and the whole line from the client's socket to the engine and back."""
