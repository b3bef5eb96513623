"""What a request costs, beside every other way to get a session."""
