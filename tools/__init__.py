"""What makes the embedded model, and what puts results into the documentation: `python -m tools.NAME`."""
