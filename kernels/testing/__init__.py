"""Tests of Triton kernels on a machine without a GPU; `docs/testing-kernels.md` tells how.

- `interpreter`: repairs of Triton's CPU interpreter, without which bfloat16 is wrong.
- `guard`: bounds, races, program order and masked lanes, watched while kernels run in it.
- `codegen`: what the compiler makes of a launch: registers, spills, instructions, access widths.
- `variants`: what would be compiled anew, for code that must not wait for a compiler.

The first two need TRITON_INTERPRET=1 when triton is first imported, the others need it unset: two
processes. They know nothing of this package's kernels.
"""
