"""The validation loss: reading batches, the paths that compute it, and what it leaves untouched."""
