"""The step itself, run on tensors without data."""
