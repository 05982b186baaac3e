"""Several ranks of one executor: rank 0 forms the batches, and all ranks run them on their shares of the model."""
