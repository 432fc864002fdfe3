"""Measurements of trainkit beside others: ``scripts/bench`` and ``scripts/compare_trl``."""
