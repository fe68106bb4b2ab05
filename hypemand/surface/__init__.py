"""What the outside sees: log, reports and tables."""
