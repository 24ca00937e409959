"""The validation loss: reading batches, three ways to it, and what it leaves untouched."""
