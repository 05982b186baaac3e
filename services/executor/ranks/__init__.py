"""Several ranks of one executor: rank 0 decides, and the others do as it does on their shares of the model."""
