"""The engines that the bench compares, one file each, in one shape (`base.Peer`)."""

from __future__ import annotations

# Name -> what it computes in. Each runs in a Python of its own: `<envs>/<name>/bin/python`.
PRECISIONS = {
    "ours": ("fp32", "bf16", "int8", "int4"),
    "peft": ("fp32", "bf16"),
    "mistralrs": ("fp32", "bf16"),
    "llamacpp": ("fp32", "bf16", "int8", "int4"),
    "openvino": ("fp32", "bf16", "int8"),
}

# Names whose packages the project's own environment has (`make install`).
AT_HOME = ("ours", "peft")
