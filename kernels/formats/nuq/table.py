"""The parameters of `NonUniform` as compiled kernels read them.

    values           | levels [n] | bounds [n] |
    keys, all heads  | levels [n] | bounds [n] | in a page [page_size, planes] | digits |
    of each head     | scale [head_dim] | zero [head_dim] | importance [head_dim] |

with n = 2^width (the last bound is infinite) and head_dim / 2 planes; the pairs that RoPE does
not rotate come last. `in a page` and `digits` [4, 256, planes] are cosines, followed by as many
sines: of a token's angle relative to its page's first, and of the angle that one base-256 digit
of a page's position adds, lowest digit first. So no kernel computes an angle, which at a million
tokens would need fp64.
"""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import Params
from kvmesh.kernels.formats.nuq.rope import phases
from kvmesh.kernels.formats.nuq.side import NonUniform

DIGITS = 4  # of an int32
BASE = 256


def table(side: NonUniform, params: Params, page_size: int) -> torch.Tensor:
    levels, bounds = params["levels"].float(), params["bounds"].float()
    common = [levels, bounds, bounds.new_full((1,), torch.inf)]
    if side.values:
        return torch.cat(common)
    inv_freq, scale = params["inv_freq"], params["scale"]
    still = inv_freq.new_zeros(scale.shape[1] // 2 - inv_freq.shape[0])
    inv_freq = torch.cat((inv_freq, still))
    digit = torch.arange(BASE, device=inv_freq.device)
    places = BASE ** torch.arange(DIGITS, device=inv_freq.device)
    for positions in (
        torch.arange(page_size, device=inv_freq.device),
        places[:, None] * digit,
    ):
        phase = phases(inv_freq, positions)
        common += [phase.real.flatten(), phase.imag.flatten()]
    heads = torch.stack((scale, params["zero"], params["importance"]), dim=1)
    return torch.cat((*common, heads.float().flatten()))
