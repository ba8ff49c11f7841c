"""What happens inside a net while it trains: one quantity a file."""
