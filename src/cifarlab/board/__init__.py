"""A runs folder as live pages on this machine: a table of all runs, and each run's report while it trains."""
