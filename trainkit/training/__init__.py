"""Plan, step, loop, evaluation, checkpoints, metrics."""
