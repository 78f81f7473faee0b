"""Launch parameters of the GPU kernels: tables by (architecture, op, shape, tokens), no autotuning.

A table is a JSON file in `launch_plans/`. What enters a row's arithmetic (K splits, K tiles) stands
under "arithmetic" and depends on the op and its shape alone; what only places the work (row and
column tiles, warps, stages) stands under "schedule", by token bucket. So a row's bits cannot depend
on how many rows are with it. `python -m multilora_kernels.cuda.tune` writes the tables anew on a
GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_suffix("")
ARCHITECTURES = (80, 90, 100)
"""Those with a table of their own; others take that of the next lower one."""
ANY = "*"
HEAD_DIMS = (16, 32, 64, 128)
"""Those that paged attention is compiled for: wider ones spill, or want too much shared memory."""
FP8_SM = 89
"""The first architecture with e4m3."""
SEQ_BLOCKS = (128, 256, 1024)
"""Sequences that a program of paged attention looks through at once; beyond, powers of two."""
MATMUL_ROWS = (64, 256)
"""Row counts up to which the batch-invariant matrix product has a schedule of its own."""

LaunchPlan = Mapping[str, int]


class UnsupportedDevice(RuntimeError):
    """The GPU is too old for these kernels."""


@dataclass(frozen=True)
class CudaTarget:
    """What the launches need to know of a GPU; plain data, so that tests need none."""

    sm: int  # compute capability, e.g. 90
    num_sms: int  # multiprocessors
    plans: LaunchPlans


@dataclass(frozen=True)
class LaunchPlans:
    """The table of one architecture."""

    ops: Mapping[str, Any]
    _chosen: dict[tuple[str, tuple[int, ...], int], LaunchPlan] = field(
        default_factory=dict, repr=False
    )

    def choose(self, op: str, shape: Sequence[int], tokens: int) -> LaunchPlan:
        """The parameters of `op` on weights of `shape` for so many tokens."""
        key = (op, tuple(shape), tokens)
        found = self._chosen.get(key)
        if found is None:
            entry = self.entry(op, shape)
            bucket = bucket_of(tokens, entry["schedule"])
            found = self._chosen[key] = {**entry["arithmetic"], **entry["schedule"][bucket]}
        return found

    def row_bounds(self) -> list[int]:
        """Row counts up to which all launches are alike: kernels are compiled anew beyond each."""
        entries = [entry for shapes in self.ops.values() for entry in shapes.values()]
        buckets = {int(b) for entry in entries for b in entry["schedule"] if b != ANY}
        return sorted(buckets.union(MATMUL_ROWS))

    def entry(self, op: str, shape: Sequence[int]) -> Mapping[str, Any]:
        """{"arithmetic": ..., "schedule": {bucket: ...}} of a shape, or of any shape."""
        shapes = self.ops[op]
        found: Mapping[str, Any] = shapes.get(name_of(shape), shapes[ANY])
        return found


def name_of(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def bucket_of(tokens: int, buckets: Mapping[str, Any]) -> str:
    """The smallest bucket that holds so many tokens; ANY holds the rest."""
    return min((b for b in buckets if b != ANY and int(b) >= tokens), key=int, default=ANY)


def seq_block(num_seqs: int) -> int:
    """The constant that paged attention is compiled with for so many sequences."""
    found = next((size for size in SEQ_BLOCKS if num_seqs <= size), None)
    return found or 1 << (num_seqs - 1).bit_length()


def seq_bounds(most: int) -> list[int]:
    """Sequence counts up to which all launches are alike, for up to `most` sequences."""
    bounds = [*SEQ_BLOCKS]
    while bounds[-1] < most:
        bounds.append(2 * bounds[-1])
    return bounds


def path_of(sm: int) -> Path:
    """The file of an architecture; UnsupportedDevice below sm_80."""
    fitting = [known for known in ARCHITECTURES if known <= sm]
    if not fitting:
        raise UnsupportedDevice(
            f"this GPU has compute capability {sm / 10}, the kernels need 8.0 (A100) or newer"
        )
    return FOLDER / f"sm{max(fitting)}.json"


@cache
def load(sm: int) -> LaunchPlans:
    return LaunchPlans(json.loads(path_of(sm).read_text(encoding="utf-8")))


def target(sm: int, num_sms: int) -> CudaTarget:
    """A device of that architecture with its table."""
    return CudaTarget(sm, num_sms, load(sm))


@cache
def target_of(where: torch.device) -> CudaTarget:
    """The CUDA device that a tensor lies on."""
    found = torch.cuda.get_device_properties(where)
    return target(found.major * 10 + found.minor, found.multi_processor_count)
