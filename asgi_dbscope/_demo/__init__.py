"""The demo: a small ledger, served and toured over HTTP. Only the command imports it."""
