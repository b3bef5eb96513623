"""The same routes in each framework: one file for each."""
