"""Training runs: loop, checkpoints, resume, report."""
