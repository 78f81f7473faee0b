"""Options that several commands have: settings of the engine, absent unless they are given."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Input columns that share a scale: 32, 64 or 128.")
]
KVCacheDtype = Annotated[str, typer.Option(help="auto, int8 (CPU), fp8 (GPU).")]
LoraPages = Annotated[
    int | None, typer.Option(help="Pages of 8 ranks at each site; 8 a slot, 4 on a GPU.")
]
MaxLoraRank = Annotated[int | None, typer.Option(help="Largest rank of a mix; 512.")]
MaxLoras = Annotated[int | None, typer.Option(help="Mixes of adapters resident at once; 16.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and answer; the model's own limit.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Requests that run at once; 64.")]
MemoryShare = Annotated[float | None, typer.Option(help="Share of a GPU's memory to take; 0.9.")]
Quantization = Annotated[
    str | None, typer.Option(help="int8 or int4, of the base when it is loaded.")
]
NumKVBlocks = Annotated[
    int | None, typer.Option(help="KV blocks of 16 tokens; up to 4 GiB, on a GPU what is left.")
]
