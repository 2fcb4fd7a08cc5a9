"""One base model serves many adapters over HTTP: each request names its adapter, and all share one run.

    pip install -e '.[examples]' && python examples/serve_adapters.py  # trains three first, if there is no ./served
    curl localhost:8000/embed -H 'content-type: application/json' -d '{"text": "a list", "adapter": "class"}'
    curl localhost:8000/adapters
    curl -X DELETE localhost:8000/adapters/class
    curl -X PUT localhost:8000/adapters/class

Requests that come within a few milliseconds are one batch, whose rows choose their adapters. PUT reads
`served/adapters/NAME`, a directory that PEFT or `save_adapter` wrote, also if the name is taken; DELETE forgets the
name. Both make the next session while the one before still answers, and change over between two batches: a request gets
the adapter that had its name then, or 404 with the names there are. A directory that does not fit changes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

import fastapi
import pydantic
from embedding_model import EmbeddingModel, UnknownAdapter, prepare
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import lora_fx

Name = Annotated[str, fastapi.Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # it is a directory's name, too


class Query(pydantic.BaseModel):
    """A text, and the adapter to embed it with; none for the base."""

    text: str = pydantic.Field(min_length=1, max_length=2000)
    adapter: str | None = None


class Answer(pydantic.BaseModel):
    """The text's unit vector, and how many requests shared the run."""

    embedding: list[float]
    batch: int


class Adapters(pydantic.BaseModel):
    """What a query may choose."""

    adapters: list[str]


class Batcher:
    """Has all that is asked within `wait` seconds answered together, `size` at most."""

    def __init__(self, model: EmbeddingModel, *, wait: float, size: int) -> None:
        self._model, self._wait, self._size = model, wait, size
        self._waiting: asyncio.Queue[tuple[Query, asyncio.Future] | None] = asyncio.Queue()
        self._is_open = True

    async def ask(self, query: Query) -> Answer:
        """The query's answer, or UnknownAdapter."""
        if not self._is_open:
            raise fastapi.HTTPException(503, "shutting down")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((query, future))
        return await future

    async def work(self) -> None:
        """Answer until `close` was called and nobody waits."""
        is_last = False
        while not is_last:
            batch = [await self._waiting.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait):
                    while len(batch) < self._size and batch[-1] is not None:
                        batch.append(await self._waiting.get())
            is_last = batch[-1] is None
            await self._answer([each for each in batch if each is not None and not each[1].done()])

    async def _answer(self, batch: Sequence[tuple[Query, asyncio.Future]]) -> None:
        try:
            found = await asyncio.to_thread(self._model.embed, [(query.text, query.adapter) for query, _ in batch])
        except Exception as error:  # theirs, and not the end of the service
            found = [error] * len(batch)
        count = sum(not isinstance(each, Exception) for each in found)
        for (_, future), each in zip(batch, found, strict=True):
            if future.done():  # whoever asked has left
                continue
            if isinstance(each, Exception):
                future.set_exception(each)
            else:
                future.set_result(Answer(embedding=each.tolist(), batch=count))

    def close(self) -> None:
        """Take no more, and let `work` end."""
        self._is_open = False
        self._waiting.put_nowait(None)


def make_app(model: EmbeddingModel, *, wait: float = 0.005, size: int = 32) -> fastapi.FastAPI:
    """The service. It owns nothing that outlives it."""
    batcher, changes = Batcher(model, wait=wait, size=size), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        try:
            yield
        finally:
            batcher.close()
            await worker  # who waits is answered

    app = fastapi.FastAPI(title="one base, many adapters", lifespan=lifespan)

    @app.exception_handler(UnknownAdapter)
    async def unknown(request: fastapi.Request, error: UnknownAdapter) -> JSONResponse:
        return JSONResponse({"detail": str(error), "adapters": error.known}, 404)

    @app.exception_handler(RequestValidationError)
    async def unfit(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        """Without what was sent, as FastAPI has it: NaN or half a character is in no answer."""
        return JSONResponse({"detail": [{key: each[key] for key in ("loc", "msg")} for each in error.errors()]}, 422)

    @app.post("/embed")
    async def embed(query: Query) -> Answer:
        return await batcher.ask(query)

    @app.get("/adapters")
    async def adapters() -> Adapters:
        return Adapters(adapters=list(model.names))

    @app.put("/adapters/{name}")
    async def add(name: Name) -> Adapters:
        async with changes:
            try:
                await asyncio.to_thread(model.choose, [*(n for n in model.names if n != name), name])
            except lora_fx.LoraFxError as error:
                raise fastapi.HTTPException(422, str(error)) from error
            return Adapters(adapters=list(model.names))

    @app.delete("/adapters/{name}")
    async def remove(name: Name) -> Adapters:
        async with changes:
            if name not in model.names:
                raise UnknownAdapter(name, model.names)
            await asyncio.to_thread(model.choose, [n for n in model.names if n != name])
            return Adapters(adapters=list(model.names))

    return app


def main() -> None:
    """Serve until interrupted."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("served"))
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not options.directory.exists():
        options.directory.mkdir()
        for name, losses in prepare(options.directory).items():
            print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    names = sorted(path.name for path in (options.directory / "adapters").iterdir())
    uvicorn.run(make_app(EmbeddingModel(options.directory, names)), port=options.port)


if __name__ == "__main__":
    main()
