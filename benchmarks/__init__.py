"""What less_fast costs and what its results are worth, one file per question."""
