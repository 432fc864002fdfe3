"""What to train: the schema, and the one reader of it."""
