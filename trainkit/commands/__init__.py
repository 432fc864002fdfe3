"""One module a command; each reads as a story."""
