"""Which τ a stage tries next: pure state machines, without torch."""
