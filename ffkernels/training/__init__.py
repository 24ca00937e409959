"""What to fine-tune and on what: models, tasks, the training loop, and the paper's comparison."""
