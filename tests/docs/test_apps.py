"""The complete apps in `examples/` start, answer, and leave what they say they leave."""

import importlib.util
import sys

import pytest

from tests.docs.blocks import ROOT

ORDERS = "SELECT item FROM orders ORDER BY id"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import one of the apps, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


async def test_fastapi_app(load, serve, query):
    """G1, G4, G8: the FastAPI app commits, previews, confirms after the response, streams."""
    async with serve(load("fastapi_app").app) as client:
        preview = await client.post("/orders/preview", params={"item": "tea"})
        placed = await client.post("/orders", params={"item": "tea"})
        again = await client.post("/orders", params={"item": "tea"})
        found = await client.get("/orders/1")
        missing = await client.get("/orders/2")
        listed = await client.get("/orders")

    assert (200, {"id": 1}) == (preview.status_code, preview.json())
    assert (201, {"id": 1}) == (placed.status_code, placed.json())
    assert (409, {"detail": "that is ordered already"}) == (again.status_code, again.json())
    assert {"item": "tea", "is_confirmed": True} == found.json()
    assert 404 == missing.status_code
    assert "tea\n" == listed.text
    assert ["tea"] == query(ORDERS)


async def test_litestar_app(load, serve, query):
    """G1, G3: the Litestar app commits what it answers with 201, and nothing that it raises."""
    async with serve(load("litestar_app").app) as client:
        placed = await client.post("/orders", params={"item": "tea"})
        refused = await client.post("/orders/none-left", params={"item": "coffee"})
        found = await client.get("/orders/1")
        missing = await client.get("/orders/2")

    assert (201, {"id": 1}) == (placed.status_code, placed.json())
    assert (404, 404) == (refused.status_code, missing.status_code)
    assert {"item": "tea"} == found.json()
    assert ["tea"] == query(ORDERS)


async def test_plain_asgi_app(load, serve, query):
    """G1, G3: the app without a framework commits a 200 and rolls a 500 back."""
    async with serve(load("plain_asgi").app) as client:
        first = await client.get("/")
        broken = await client.get("/broken")
        second = await client.get("/")

    assert ["visit 1", "visit 2", "visit 2"] == [each.text for each in (first, broken, second)]
    assert ["/", "/"] == query("SELECT path FROM visits", file="visits.db")
