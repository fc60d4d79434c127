"""Asking for memory to be brought into the L2 cache, without waiting for it. Hopper and later."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(pointer, live, size):
    """Bring `size` bytes (a multiple of 16) at each 16-byte aligned pointer into L2, where live. pointer, live [n]."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred p;
            setp.ne.s32 p, $2, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $3;
            mov.b32 $0, 0;
        }""",
        "=r,l,r,r",
        [pointer.to(tl.int64), live.to(tl.int32), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
