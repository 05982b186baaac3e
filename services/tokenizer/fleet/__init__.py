"""The current state of the deployment: this tokenizer's counts, and the states of the schedulers and their
executors."""
