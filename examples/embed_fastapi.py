"""A server of your own, many adapters from one engine: `uvicorn embed_fastapi:app`."""

import os
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from multilora import AsyncEngine, EngineConfig, RequestOutputKind, SamplingParams, errors


@asynccontextmanager
async def lifespan(app: FastAPI):
    async with AsyncEngine(EngineConfig(model=os.environ["BASE"])) as app.state.engine:
        for folder in Path(os.environ["ADAPTERS"]).iterdir():
            await app.state.engine.register_adapter(folder.name, folder)
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/generate")
async def generate(prompt: str = Body(), adapter: str | None = Body(None)):
    params = SamplingParams(max_tokens=64, temperature=0, output_kind=RequestOutputKind.DELTA)
    stream = app.state.engine.generate(prompt, params, adapter=adapter)
    try:
        first = await anext(stream)  # what is wrong with the request is known by now
    except errors.MultiloraError as error:
        status = 429 if isinstance(error, errors.EngineFullError) else 400
        raise HTTPException(status, str(error)) from error

    async def text():
        yield first.outputs[0].text
        async for output in stream:  # a client that goes ends the request
            yield output.error or output.outputs[0].text

    return StreamingResponse(text(), media_type="text/plain")
