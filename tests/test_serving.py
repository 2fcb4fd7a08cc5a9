"""examples/serve_adapters.py: who asks at once shares a run, everyone has their own adapter, and changes are atomic."""

from __future__ import annotations

import asyncio
import functools
import importlib
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi
import httpx2
import numpy as np
import pytest

import exporters

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = (
    "a list",
    "Classes may be defined inside of functions, and what is then",
    "raise",
    "format strings with braces",
)
TOLERANCE = 256 * np.finfo(np.float32).eps  # of unit vectors; rows of a batch are padded, and single texts are not


class Served:
    """A directory to serve, and what each adapter's own folded file gives, one text at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.make_app = importlib.import_module("serve_adapters").make_app
        embedding_model = importlib.import_module("embedding_model")
        self.Model = embedding_model.EmbeddingModel
        self.losses = embedding_model.prepare(directory, layers=1, steps=6)
        self.names = list(self.losses)
        self.model = self.Model(directory, self.names)  # for tests that change nothing
        self.alone = {None: self.Model(directory, ())}
        for name in self.names:
            folded = directory / f"{name} folded"
            folded.mkdir()
            exporters.fold_into_onnx(directory / "base.onnx", directory / "adapters" / name, folded / "base.onnx")
            (folded / "tokenizer.json").symlink_to(directory / "tokenizer.json")
            self.alone[name] = self.Model(folded, ())

    @functools.cache  # noqa: B019, lives as long as the module
    def expected(self, text: str, name: str | None) -> np.ndarray:
        return self.alone[name].embed([(text, None)])[0]

    def nearest(self, text: str, embedding: list[float]) -> str | None:
        """Whose answer it is, which has to be clear."""
        errors = {name: float(abs(self.expected(text, name) - embedding).max()) for name in self.alone}
        first, second, *_ = sorted(errors, key=errors.__getitem__)
        assert errors[first] < TOLERANCE < errors[second] / 4, errors
        return first


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        served = Served(tmp_path_factory.mktemp("served"))
        for name in [path.stem for path in EXAMPLES.glob("*.py") if path.stem in sys.modules]:
            del sys.modules[name]  # others import their own
    return served


def app_of(served: Served, names: list[str] | None = None, **options: Any) -> fastapi.FastAPI:
    return served.make_app(served.model if names is None else served.Model(served.directory, names), **options)


def client_of(app: fastapi.FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://served")


@asynccontextmanager
async def serving(served: Served, names: list[str] | None = None, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service that has started, and that is shut down at the end."""
    app = app_of(served, names, **options)
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


def ask(client: httpx2.AsyncClient, text: str, name: str | None) -> Any:
    return client.post("/embed", json={"text": text, "adapter": name})


async def met(found: set[Any], wanted: Any) -> None:
    while wanted not in found:
        await asyncio.sleep(0.01)


def test_the_adapters_were_trained(served: Served) -> None:
    assert all(np.mean(losses[-2:]) < losses[0] for losses in served.losses.values()), served.losses


def test_who_asks_at_once_shares_a_run_and_has_their_own_adapter(served: Served) -> None:
    asked = [(text, name) for text in TEXTS for name in (None, *served.names)]

    async def talk() -> list[dict[str, Any]]:
        async with serving(served, wait=60, size=len(asked)) as client:
            answers = await asyncio.gather(*(ask(client, text, name) for text, name in asked))
            return [answer.raise_for_status().json() for answer in answers]

    answers = asyncio.run(talk())
    assert {answer["batch"] for answer in answers} == {len(asked)}
    for (text, name), answer in zip(asked, answers, strict=True):
        assert served.nearest(text, answer["embedding"]) == name


def test_batches_have_a_size(served: Served) -> None:
    async def talk() -> list[int]:
        async with serving(served, wait=60, size=4) as client:
            answers = await asyncio.gather(*(ask(client, text, None) for text in 2 * TEXTS))
            return [answer.json()["batch"] for answer in answers]

    assert asyncio.run(talk()) == [4] * 8


def test_unknown_adapters_are_told_those_there_are_and_disturb_nobody(served: Served) -> None:
    async def talk() -> tuple[Any, Any]:
        async with serving(served, wait=60, size=2) as client:
            return await asyncio.gather(ask(client, "a list", "clas"), ask(client, "a list", "class"))

    unknown, known = asyncio.run(talk())
    assert unknown.status_code == 404
    assert unknown.json() == {"detail": "there is no adapter 'clas'", "adapters": served.names}
    assert known.json()["batch"] == 1
    assert served.nearest("a list", known.json()["embedding"]) == "class"


@pytest.mark.parametrize(
    "query",
    [{"text": ""}, {"text": "x" * 2001}, {"adapter": "class"}, {"text": "a list", "adapter": 1}],
    ids=["empty", "long", "no text", "no name"],
)
def test_what_is_no_query_is_refused(served: Served, query: dict[str, Any]) -> None:
    async def talk() -> int:
        async with serving(served) as client:
            return (await client.post("/embed", json=query)).status_code

    assert asyncio.run(talk()) == 422


@pytest.mark.parametrize("value", [rb'"\ud800"', b"NaN", b"1e999", b"{}"])
def test_refusals_send_back_nothing_that_json_cannot_hold(served: Served, value: bytes) -> None:
    async def talk() -> Any:
        async with serving(served) as client:
            body = b'{"text": %b}' % value
            return await client.post("/embed", content=body, headers={"content-type": "application/json"})

    refused = asyncio.run(talk())
    assert refused.status_code == 422
    assert [each["loc"] for each in refused.json()["detail"]] == [["body", "text"]]


def test_adapters_come_and_go_while_it_serves(served: Served) -> None:
    """Whoever asks meanwhile has their adapter or 404, and never another's vector."""
    kept, changed = served.names[0], served.names[1]

    found: set[tuple[str | None, int]] = set()

    async def keep_asking(client: httpx2.AsyncClient) -> None:
        names = (kept, changed, None)
        while True:
            answers = await asyncio.gather(*(ask(client, "a list", name) for name in names))
            for name, answer in zip(names, answers, strict=True):
                found.add((name, answer.status_code))
                if answer.status_code == 200:
                    assert served.nearest("a list", answer.json()["embedding"]) == name
                else:
                    assert changed not in answer.json()["adapters"]
            await asyncio.sleep(0.02)

    async def talk() -> None:
        async with serving(served, [kept]) as client, asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(keep_asking(client))
            await met(found, (changed, 404))
            added = await client.put(f"/adapters/{changed}")
            assert added.json() == {"adapters": [kept, changed]}
            assert (await ask(client, "a list", changed)).status_code == 200
            await met(found, (changed, 200))
            removed = await client.delete(f"/adapters/{changed}")
            assert removed.json() == {"adapters": [kept]}
            assert (await ask(client, "a list", changed)).status_code == 404
            asking.cancel()

    asyncio.run(talk())
    assert found == {(kept, 200), (changed, 200), (changed, 404), (None, 200)}


def test_the_last_adapter_can_go_and_changes_at_once_are_all_made(served: Served) -> None:
    async def talk() -> None:
        async with serving(served, []) as client:
            assert (await client.get("/adapters")).json() == {"adapters": []}
            answer = await ask(client, "a list", None)
            assert served.nearest("a list", answer.json()["embedding"]) is None
            names = served.names[:2]
            await asyncio.gather(*(client.put(f"/adapters/{name}") for name in names))
            assert set((await client.get("/adapters")).json()["adapters"]) == set(names)
            await asyncio.gather(*(client.delete(f"/adapters/{name}") for name in names))
            assert (await client.get("/adapters")).json() == {"adapters": []}
            assert (await client.delete("/adapters/class")).status_code == 404

    asyncio.run(talk())


def test_a_directory_that_does_not_fit_changes_nothing(served: Served) -> None:
    (served.directory / "adapters" / "broken").mkdir(exist_ok=True)

    async def talk() -> None:
        async with serving(served, served.names[:1]) as client:
            for name in ("broken", "missing"):
                refused = await client.put(f"/adapters/{name}")
                assert refused.status_code == 422
                assert name in refused.json()["detail"]
            assert (await client.put("/adapters/..%2Fadapters")).status_code in (404, 422)  # no way out
            assert (await client.get("/adapters")).json() == {"adapters": served.names[:1]}
            assert (await ask(client, "a list", served.names[0])).status_code == 200

    asyncio.run(talk())


def test_who_waits_when_it_shuts_down_is_answered(served: Served) -> None:
    async def talk() -> tuple[Any, int]:
        app = app_of(served, wait=60)
        async with client_of(app) as client:
            async with app.router.lifespan_context(app):
                waiting = asyncio.create_task(ask(client, "a list", None))
                await asyncio.sleep(0.2)
            return await waiting, (await ask(client, "a list", None)).status_code

    answered, late = asyncio.run(asyncio.wait_for(talk(), 50))  # not the minute that it would have waited for more
    assert served.nearest("a list", answered.json()["embedding"]) is None
    assert late == 503


def test_an_error_is_theirs_whom_it_hits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails is told to those who were in it; the service goes on."""

    async def talk() -> tuple[BaseException | Any, Any]:
        async with serving(served) as client:
            with monkeypatch.context() as patch:
                patch.setattr(served.Model, "_run", lambda *_: 1 / 0)
                (failed,) = await asyncio.gather(ask(client, "a list", None), return_exceptions=True)
            return failed, await ask(client, "a list", None)

    failed, after = asyncio.run(talk())
    assert isinstance(failed, ZeroDivisionError)  # the transport hands it on; uvicorn makes a 500 of it
    assert after.status_code == 200


def test_serving_needs_no_torch(served: Served) -> None:
    script = (
        "import sys, pathlib, serve_adapters as s\n"
        f"model = s.EmbeddingModel(pathlib.Path({str(served.directory)!r}), {served.names!r})\n"
        "s.make_app(model); model.embed([('a list', 'class')])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=EXAMPLES)
