"""What a run cost and what came of it: FLOPs, the run log, the report."""
