"""Loads the C++ library of csrc/ and declares its functions; without it, `LIB` is None.

The library is a plain C ABI reached by `ctypes`: it is built without torch, and one file serves
every Python and torch. Everything works without it, only slower.
"""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

# torch first: its OpenMP runtime is the one that our library then uses (openmp.py).
import torch

from . import openmp

logger = logging.getLogger(__name__)

ABI_VERSION = 14  # MULTILORA_ABI_VERSION of csrc/abi.h

# The functions of csrc/abi.h take these structures; fields in its order, under its names.
_Fields = list[tuple[str, type]]


def _fields(*groups: tuple[type, str]) -> _Fields:
    """Fields from (type, "name name ...") groups."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class LoraArgs(ctypes.Structure):
    """What `lora` takes. `starts` is the array that slice_starts points to."""

    starts: ctypes.Array[c_int64]

    _fields_ = _fields(
        (c_void_p, "y x ids"),
        (c_int64, "y_stride x_stride tokens in_ out"),
        (c_void_p, "a b"),
        (c_int64, "a_stride b_stride pages"),
        (c_void_p, "slice_starts"),
        (c_int64, "slices"),
        (c_void_p, "page_ids page_weights num_pages scale_row scale bias"),
        (c_int64, "slots max_pages table_stride scale_rows"),
        (c_void_p, "tile_slots tile_starts tile_lens num_tiles"),
        (c_int64, "tiles"),
        (c_int32, "dtype page_dtype scale_dtype num_threads"),
    )


class ColumnsArgs(ctypes.Structure):
    """What `lora_columns` takes."""

    _fields_ = _fields(
        (c_void_p, "y x"),
        (c_int64, "y_stride x_stride tokens in_ out"),
        (c_void_p, "column_ids num_columns weights"),
        (c_int64, "slots max_columns weights_stride"),
        (c_void_p, "tile_slots tile_starts tile_lens num_tiles"),
        (c_int64, "tiles"),
        (c_int32, "dtype weights_dtype num_threads"),
    )


class AttentionArgs(ctypes.Structure):
    """What `paged_attention` takes."""

    _fields_ = _fields(
        (c_void_p, "out q"),
        (c_int64, "q_stride"),
        (c_void_p, "k v"),
        (c_int64, "block_stride token_stride"),
        (c_void_p, "k_scale v_scale block_table seq_lens query_starts"),
        (c_int64, "tokens seqs heads kv_heads head_dim blocks block_size max_blocks"),
        (c_float, "scale"),
        (c_int32, "dtype kv_dtype num_threads"),
    )


class SiluArgs(ctypes.Structure):
    """What `silu_mul` takes."""

    _fields_ = _fields(
        (c_void_p, "out x"), (c_int64, "x_stride tokens inter"), (c_int32, "dtype num_threads")
    )


class NormArgs(ctypes.Structure):
    """What `rms_norm` takes."""

    _fields_ = _fields(
        (c_void_p, "out x residual weight change change_row"),
        (c_int64, "x_stride residual_stride change_stride change_rows tokens hidden"),
        (c_float, "eps"),
        (c_int32, "dtype num_threads"),
    )


class RopeArgs(ctypes.Structure):
    """What `rope_store_kv` takes."""

    _fields_ = _fields(
        (c_void_p, "q k v"),
        (c_int64, "q_stride kv_stride"),
        (c_void_p, "cos sin positions kv_slots k_blocks v_blocks"),
        (c_int64, "block_stride token_stride tokens heads kv_heads head_dim"),
        (c_int64, "max_position blocks block_size"),
        (c_int32, "dtype num_threads"),
    )


class LinearArgs(ctypes.Structure):
    """What `linear` takes."""

    _fields_ = _fields(
        (c_void_p, "y x packed scales bias"),
        (c_int64, "y_stride x_stride group rows in_ out"),
        (c_int32, "dtype kind num_threads"),
    )


class MaskArgs(ctypes.Structure):
    """What `apply_token_mask` takes."""

    _fields_ = _fields(
        (c_void_p, "logits mask"),
        (c_int64, "logits_stride mask_stride rows vocab"),
        (c_int32, "dtype num_threads"),
    )


class TopArgs(ctypes.Structure):
    """What `top_logprobs` takes."""

    _fields_ = _fields(
        (c_void_p, "logits targets ids logprobs ranks"),
        (c_int64, "logits_stride rows vocab top"),
        (c_int32, "dtype num_threads"),
    )


class DrawArgs(ctypes.Structure):
    """What `draw` takes."""

    _fields_ = _fields(
        (c_void_p, "tokens failed logits temperature top_k top_p log_min_p numbers"),
        (c_int64, "logits_stride rows vocab"),
        (c_int32, "dtype num_threads"),
    )


class CallArgs(ctypes.Structure):
    """One call of what `run_calls` takes."""

    _fields_ = _fields((c_void_p, "args"), (c_int64, "kind"))


# Argument types of every function in csrc/abi.h, in its order.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "select_isa": (c_int32, c_void_p),  # most, chosen
    "lora": (POINTER(LoraArgs),),
    "lora_columns": (POINTER(ColumnsArgs),),
    "paged_attention": (POINTER(AttentionArgs),),
    "silu_mul": (POINTER(SiluArgs),),
    "rms_norm": (POINTER(NormArgs),),
    "rope_store_kv": (POINTER(RopeArgs),),
    "linear": (POINTER(LinearArgs),),
    "apply_token_mask": (POINTER(MaskArgs),),
    "top_logprobs": (POINTER(TopArgs),),
    "draw": (POINTER(DrawArgs),),
    "run_calls": (
        POINTER(CallArgs),
        c_int64,  # count
        c_int32,  # num_threads
        c_void_p,  # seconds
    ),
}

# Those that check what their index arrays name, and return a code of MISTAKES; the others nothing.
CHECKED = frozenset(
    {
        "lora",
        "lora_columns",
        "paged_attention",
        "rms_norm",
        "rope_store_kv",
        "top_logprobs",
        "run_calls",
    }
)

MOST_TOP = 256  # MULTILORA_MOST_TOP

# What `select_isa` takes and says; every entry is a step up from the one before.
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")

# What the `dtype` arguments mean; keys and values may have one more.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KV_CODES = {**DTYPE_CODES, torch.int8: 3}


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's first element; null for None."""
    return None if tensor is None else tensor.data_ptr()


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
        openmp.provide()
        lib = ctypes.CDLL(str(path))
        version = lib.multilora_abi_version()
        if version != ABI_VERSION:
            raise AttributeError(f"it has ABI version {version}, not {ABI_VERSION}")
        for name, argtypes in SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = argtypes
            function.restype = c_int32 if name in CHECKED else None
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
    """Uses the best instruction set up to `most` and returns its name: see csrc/abi.h.

    Process-wide, for tests and for measuring; MULTILORA_CPU_ISA sets it at start-up. Raises
    ValueError for a name that is not in ISAS, RuntimeError without the library.
    """
    if most not in ISAS:
        raise ValueError(f"{most!r} is no instruction set; there are {', '.join(ISAS)}")
    if LIB is None:
        raise RuntimeError("the C++ library is not built or is switched off")
    chosen = c_int32()
    LIB.select_isa(ISAS.index(most), byref(chosen))
    return ISAS[chosen.value]


def _wanted() -> Path | None:
    """The file to load: MULTILORA_CPP_LIBRARY names another build, for sanitizers and compilers."""
    if os.environ.get("MULTILORA_DISABLE_CPP", "") not in ("", "0"):
        return None
    named = os.environ.get("MULTILORA_CPP_LIBRARY")
    return Path(named) if named else find(Path(__file__).parents[1])


PATH = _wanted()
LIB: ctypes.CDLL | None = load(PATH) if PATH else None
HAS_CPP: bool = LIB is not None
if not HAS_CPP and PATH is not None and os.environ.get("MULTILORA_CPP_LIBRARY"):
    raise ImportError(f"MULTILORA_CPP_LIBRARY names {PATH}, which cannot be used; see the log")
if HAS_CPP:
    openmp.warn_of_many()
    select_isa(os.environ.get("MULTILORA_CPU_ISA") or ISAS[-1])
