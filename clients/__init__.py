"""What people use to reach ScaleLLM: a Python client, a command line, and the launcher behind it."""
