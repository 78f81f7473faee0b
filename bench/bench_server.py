"""What HTTP costs: the same requests by AsyncEngine and over loopback from another process.

    python bench/bench_server.py                # 16 streams, a random Llama of 132M parameters
    python bench/bench_server.py --shape tiny   # next to no model: the door itself

One engine serves both ways in turn, 16 adapters of ranks 8 to 64 loaded, every output an event; the
answers must be the same. A line has medians over the repeats:

    streams/s, http/s    new tokens each second, prompts included, by AsyncEngine and over HTTP
    ratio                of the two in pairs
    us                   of the whole run's time for each output, more over HTTP
    gap ms, in gaps      p99 of the times between two events of one stream as its client sees them,
                         and in medians of AsyncEngine's own gaps
    first ms             to a stream's first token, more over HTTP, medians of a run
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

from bench_async import Pairs, Run, by_streams, measured, plan, print_row
from work import Work


def main() -> None:
    show(measured(__doc__, 16, measure))


async def measure(work: Work, args: argparse.Namespace) -> Pairs:
    """The same requests, by both ways, so many times; the first pair is left out."""
    from multilora import AsyncEngine
    from multilora.server.run import Server
    from multilora.server.settings import ServerSettings

    config, jobs = plan(work, args)
    fields = {
        "temperature": 0,
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "stream_interval": args.interval,
        "stream": True,
        "return_token_ids": True,
    }
    bodies = [{"prompt": job.ids, "model": job.adapter, **fields} for job in jobs]
    engine = AsyncEngine(config)
    for folder in work.adapters:
        await engine.load_adapter(folder.name, folder)
    server = Server(engine, ServerSettings(port=0))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port, pairs = int(server.url.rpartition(":")[2]), []
    spawn, loop = multiprocessing.get_context("spawn"), asyncio.get_running_loop()
    with ProcessPoolExecutor(1, spawn) as clients:
        for _ in range(args.repeats + 1):
            streamed = await by_streams(engine, jobs)
            posted = await loop.run_in_executor(clients, by_http, port, bodies)
            assert posted.tokens == streamed.tokens, "the answers differ"
            pairs.append((streamed, posted))
    server.should_exit = True
    await serving
    return pairs[1:]


def by_http(port: int, bodies: list[dict[str, Any]]) -> Run:
    """All requests at once, by a client that does as little as can be; in its own process."""
    return asyncio.run(_post_all(port, bodies))


async def _post_all(port: int, bodies: list[dict[str, Any]]) -> Run:
    run = Run(len(bodies))

    async def post(number: int, body: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                run.note(number, json.loads(line[6:])["choices"][0]["token_ids"])
        writer.close()

    payloads = [json.dumps(body).encode() for body in bodies]
    await asyncio.gather(*(post(i, body) for i, body in enumerate(payloads)))
    run.seconds = time.perf_counter() - run.start
    return run


def show(pairs: Pairs) -> None:
    """A line of medians."""
    gap = median(median(streamed.gaps) for streamed, _ in pairs)
    columns = {
        "streams/s": f"{median(a.rate for a, _ in pairs):.0f}",
        "http/s": f"{median(b.rate for _, b in pairs):.0f}",
        "ratio": f"{median(b.rate / a.rate for a, b in pairs):.3f}",
        "us": f"{median(1e6 * (b.seconds - a.seconds) / a.num_outputs for a, b in pairs):.1f}",
        "gap ms": f"{median(1e3 * b.p99 for _, b in pairs):.1f}",
        "in gaps": f"{median(b.p99 for _, b in pairs) / gap:.2f}",
        "first ms": f"{median(1e3 * (b.first - a.first) for a, b in pairs):.1f}",
    }
    print_row(columns)


if __name__ == "__main__":
    main()
