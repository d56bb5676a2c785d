"""Running: configuration, the runner, checkpoints, the report."""
