"""`scripts/fuzz`: mutated recipes and data files, through the command line."""
