"""Loads the C++ library of csrc/ and declares its functions; without it, `LIB` is None.

The library is a plain C ABI reached by `ctypes`: it is built without torch, and one file serves
every Python and torch. Everything works without it, only slower.
"""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import c_float, c_int32, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# torch first: the dynamic linker then gives our library torch's libgomp, instead of a second
# OpenMP with threads of its own.
import torch

logger = logging.getLogger(__name__)

ABI_VERSION = 5  # MULTILORA_ABI_VERSION of csrc/cpu_ops.h

# Argument types of every function in csrc/cpu_ops.h, in its order. All of them return nothing.
SIGNATURES: dict[str, tuple[type, ...]] = {
    "select_isa": (c_int32, c_void_p),  # most, chosen
    "apply_token_mask": (
        c_void_p,  # logits
        c_int64,  # logits_stride
        c_int32,  # dtype
        c_void_p,  # bitmask
        c_int64,  # bitmask_stride
        c_int64,  # rows
        c_int64,  # vocab
        c_int32,  # num_threads
    ),
    "lora": (
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32),  # y, x and their strides, dtype
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32),  # a, b and their strides, page_dtype
        *(c_void_p, c_void_p, c_void_p, c_int64),  # page_ids, page_weights, num_pages, stride
        *(c_void_p, c_void_p, c_void_p, c_int64),  # tile slots, starts, lens, count
        *(c_void_p, c_int64),  # planes, max_pages
        *(c_void_p, c_int64, c_int64, c_int64),  # slice_starts, slices, in, out
        c_int32,  # num_threads
    ),
    "paged_attention": (
        *(c_void_p, c_void_p, c_int64, c_int32),  # out, q, q_stride, dtype
        *(c_void_p, c_void_p, c_int64, c_int64),  # k, v, block_stride, token_stride
        *(c_void_p, c_int64),  # block_table and its stride
        *(c_void_p, c_void_p),  # seq_lens, query_starts
        *(c_int64, c_int64, c_int64, c_int64, c_int64),  # seqs, heads, kv_heads, head_dim, size
        *(c_float, c_int32),  # scale, num_threads
    ),
    "silu_mul": (c_void_p, c_void_p, c_int64, c_int32, c_int64, c_int64, c_int32),
    "rms_norm": (
        *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p),  # out, x, residual, weight
        *(c_int32, c_int64, c_int64, c_float, c_int32),  # dtype, tokens, hidden, eps, num_threads
    ),
    "rope_store_kv": (
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int32),  # q, k, v, stride, dtype
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # cos, sin, positions, kv_slots
        *(c_void_p, c_void_p, c_int64, c_int64),  # k_blocks, v_blocks and their strides
        *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int32),  # sizes, num_threads
    ),
    "gemm": (
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32),  # y, x and their strides, dtype
        *(c_void_p, c_int32, c_void_p, c_int64, c_void_p),  # packed, kind, scales, group, bias
        *(c_int64, c_int64, c_int64, c_int32),  # rows, in, out, num_threads
    ),
}

# What the `kind` argument of `gemm` means, beside those of DTYPE_CODES.
INT8, INT4 = 3, 4

# What `select_isa` takes and says; every entry is a step up from the one before.
ISAS = ("generic", "avx2", "avx512")

# What the `dtype` arguments mean.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def find(folder: Path) -> Path | None:
    """The library file in `folder`, if one was built."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_cpu{suffix}"
        if path.is_file():
            return path
    return None


def load(path: Path) -> ctypes.CDLL | None:
    """The library at `path` with its functions declared, or None (and a warning) if it is unfit."""
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.multilora_abi_version()
        if version != ABI_VERSION:
            raise AttributeError(f"it has ABI version {version}, not {ABI_VERSION}")
        for name, argtypes in SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = argtypes, None
    except OSError as error:  # for example a slim image without libgomp
        logger.warning("%s cannot be loaded, running without C++: %s", path, error)
        return None
    except AttributeError as error:
        logger.warning(
            "%s was built from other sources, running without C++: %s. "
            "Delete the file and install multilora again",
            path,
            error,
        )
        return None
    return lib


def select_isa(most: str) -> str:
    """Uses the best instruction set up to `most` and returns its name: see csrc/cpu_ops.h.

    Process-wide, for tests and for measuring; MULTILORA_CPU_ISA sets it at start-up. Raises
    ValueError for a name that is not in ISAS, RuntimeError without the library.
    """
    if most not in ISAS:
        raise ValueError(f"{most!r} is no instruction set; there are {', '.join(ISAS)}")
    if LIB is None:
        raise RuntimeError("the C++ library is not built or is switched off")
    chosen = c_int32()
    LIB.select_isa(ISAS.index(most), ctypes.byref(chosen))
    return ISAS[chosen.value]


def _wanted() -> Path | None:
    if os.environ.get("MULTILORA_DISABLE_CPP", "") not in ("", "0"):
        return None
    return find(Path(__file__).parent)


PATH = _wanted()
LIB: ctypes.CDLL | None = load(PATH) if PATH else None
HAS_CPP: bool = LIB is not None
if HAS_CPP:
    select_isa(os.environ.get("MULTILORA_CPU_ISA") or ISAS[-1])
