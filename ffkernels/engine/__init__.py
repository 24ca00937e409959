"""The Fast Forward algorithm: when a stage runs, which τ comes next, what the loss is, how it is run."""
