"""A stage as CUDA graphs: capture, WHILE node, checks, and the executors that replay them."""
