"""The app, for a server to load."""

from tests.server.app import make_app

app = make_app()
