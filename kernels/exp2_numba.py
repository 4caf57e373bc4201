"""Powers of two for code that Numba compiles, which vectorises no exponential of its own."""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.tiles_numba import compiled, float_of

LOG2_E = np.float32(1.4426950408889634)
# 2^f for |f| <= 1/2, relative error 2e-7: the polynomial of Cephes' exp2f (Moshier).
EXP2_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (
        1.535336188319500e-4,
        1.339887440266574e-3,
        9.618437357674640e-3,
        5.550332471162809e-2,
        2.402264791363012e-1,
        6.931472028550421e-1,
    )
)
_C0, _C1, _C2, _C3, _C4, _C5 = EXP2_COEFFICIENTS


@compiled
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x in fp32; x is cut to [-126, 126], and NaN stays NaN."""
    y = x
    if y < np.float32(-126.0):  # not max, which may drop a NaN
        y = np.float32(-126.0)
    if y > np.float32(126.0):
        y = np.float32(126.0)
    # Truncation of a positive number, which rounds to the nearest after the shift by 126.5.
    whole = np.int32(y + np.float32(126.5)) - np.int32(126)
    f = y - np.float32(whole)
    p = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
    return (p * f + np.float32(1.0)) * float_of((whole + np.int32(127)) << np.int32(23))
