"""Tests of Triton kernels on a machine without a GPU; `docs/testing-kernels.md` tells how.

- `interpreter`: repairs of Triton's CPU interpreter, without which bfloat16 is wrong.
- `guard`: bounds, races, program order and masked lanes, watched while kernels run in it.
- `codegen`: what the compiler makes of a launch: registers, spills, instructions, access widths.

The first two need TRITON_INTERPRET=1 when triton is first imported, the third needs it unset: two
processes. They know nothing of this package's kernels.
"""
