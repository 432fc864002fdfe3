"""trainkit: fine-tune language models from a YAML recipe, and tell the truth about it."""

__version__ = "0.1.0"
