"""less_fast."""
