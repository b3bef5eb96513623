"""Faults on purpose, under load, and an audit of the database afterwards."""
