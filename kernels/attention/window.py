"""How far back a query sees, as one integer.

w > 0   a window that slides: the query at position i sees keys (i - w, i]
w < 0   chunks of -w tokens: it sees those keys of its own chunk that are not after it
None    the whole context
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def first_seen(positions: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
    """The first position that queries at these positions see; grows with the position."""
    if window < 0:
        return positions // -window * -window
    return np.maximum(positions - window + 1, 0)
