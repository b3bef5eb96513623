"""The same app, with a session obtained in different ways: one file for each."""
