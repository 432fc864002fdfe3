"""From files to rows: sources, conversations, encoding, packing, batches, ledger."""
