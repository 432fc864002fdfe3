"""Loading, adapters, attention, precision, loss, export."""
