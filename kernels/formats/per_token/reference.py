"""Plain-torch codec of the formats `int8` and `int4`.

    page   | K codes | V codes | K scale | K min | V scale | V min |
             page_size x head_dim x bits / 8     page_size bf16 each

    s = (max - min) / (2^bits - 1),  q = round((x - min) / s),  x^ = q * s + min

Four-bit codes share a byte: dim j in the low nibble, dim j + head_dim/2 in the
high one, so that unpacking gives two contiguous halves.

Why bf16 for scale and minimum, and how they are rounded. bf16 has fp32's range,
so 1e38 needs no special case, and a minimum of bf16 numbers is itself one. The
codes are computed against the *stored* numbers, which are rounded outwards
(minimum down, scale up): the stored grid then covers the row, and no code
saturates by more than the rounding of one division. The price is a step at most
2^-7 wider. For fp32 rows far from zero the grid also has to reach down to the
rounded minimum, at most 2^-7 |min| away: half a step is then 2^-12 |min| at
four bits, still finer than bf16 itself resolves. A floor under the scale keeps constant rows from
dividing by zero; their codes are 0 and they come back as the stored minimum.
Everything is computed on halves of the numbers, because max - min may exceed
fp32 where max and min do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.per_token.format import META_NUMBERS

SCALE_FLOOR = 2.0**-125  # its half is still a normal fp32 number
BF16_MAX = 3.3895313892515355e38
_UPPER_HALF = -65536  # 0xFFFF0000 as int32: the bits of an fp32 number that bf16 keeps


def encode(fmt: KVFormat, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    codes, meta = _encode_rows(torch.stack((k, v), dim=-3), fmt.k_bits)
    return torch.cat((codes.flatten(-2), meta.flatten(-2)), dim=-1)


def decode(
    fmt: KVFormat, pages: torch.Tensor, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    lead = pages.shape[:-1]
    flat = pages.reshape(-1, pages.shape[-1])
    tile = _tile(fmt, flat, flat.shape[0], page_size, head_dim)
    k, v = tile.dense_saturated()
    shape = (*lead, page_size, head_dim)
    return k.view(shape).to(dtype), v.view(shape).to(dtype)


def tile_index(index: torch.Tensor) -> torch.Tensor:
    return index.flatten()


def load_tile(
    fmt: KVFormat,
    sealed: torch.Tensor,
    tile_index: torch.Tensor,
    rows: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> PerTokenTile:
    picked = sealed.view(-1, sealed.shape[-1]).index_select(0, tile_index)
    return _tile(fmt, picked, rows, page_size, head_dim)


@dataclass(frozen=True, slots=True)
class PerTokenTile:
    """Codes as fp32 numbers, with the numbers that turn them into keys and values.

    k_codes, v_codes: [rows, tokens, head_dim] fp32 for 8 bits. For 4 bits two
        tensors [rows, tokens, head_dim / 2] each: the low nibble, and the whole
        byte, low + 16 * high, which saves the shift.
    k_scale, k_min, v_scale, v_min: [rows, 1, pages, page_size] fp32
    """

    k_codes: tuple[torch.Tensor, ...]
    v_codes: tuple[torch.Tensor, ...]
    k_scale: torch.Tensor
    k_min: torch.Tensor
    v_scale: torch.Tensor
    v_min: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        # q·k^ = s (q·codes) + min Σq
        if len(self.k_codes) == 1:
            products = torch.bmm(q, self.k_codes[0].mT)
        else:
            low, byte = self.k_codes
            q_low, q_high = q.chunk(2, dim=-1)
            q_high = q_high * 0.0625
            products = torch.bmm(q_high, byte.mT).baddbmm_(q_low - q_high, low.mT)
        by_page = products.view(*q.shape[:2], *self.k_scale.shape[2:])
        by_page.mul_(self.k_scale).addcmul_(q.sum(-1)[:, :, None, None], self.k_min)
        return products

    def weighted_values(self, weights: torch.Tensor) -> torch.Tensor:
        # Σ w v^ = (w s)·codes + Σ w min
        by_page = weights.view(*weights.shape[:2], *self.v_scale.shape[2:])
        scaled = (by_page * self.v_scale).view(weights.shape)
        offset = (by_page * self.v_min).sum((2, 3)).unsqueeze(-1)
        if len(self.v_codes) == 1:
            return torch.bmm(scaled, self.v_codes[0]).add_(offset)
        low, byte = self.v_codes
        out_low = torch.bmm(scaled, low)
        out_high = torch.bmm(scaled, byte).sub_(out_low).mul_(0.0625)
        return torch.cat((out_low, out_high), dim=-1).add_(offset)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            _dense(self.k_codes, self.k_scale, self.k_min),
            _dense(self.v_codes, self.v_scale, self.v_min),
        )

    def dense_saturated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `dense`, but rows that span nearly all of fp32's range stay finite."""
        k = _dense(self.k_codes, self.k_scale * 0.5, self.k_min * 0.5)
        v = _dense(self.v_codes, self.v_scale * 0.5, self.v_min * 0.5)
        return (
            k.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0),
            v.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0),
        )


def _tile(
    fmt: KVFormat, picked: torch.Tensor, rows: int, page_size: int, head_dim: int
) -> PerTokenTile:
    """picked: [rows * pages, page_bytes] uint8"""
    codes_bytes = page_size * head_dim * fmt.k_bits // 8
    width = head_dim * fmt.k_bits // 8
    meta = picked[:, 2 * codes_bytes :].view(torch.bfloat16).float()
    meta = meta.view(rows, 1, -1, META_NUMBERS, page_size)
    k_scale, k_min, v_scale, v_min = meta.unbind(3)
    sides = []
    for side in (picked[:, :codes_bytes], picked[:, codes_bytes : 2 * codes_bytes]):
        parts = (side,) if fmt.k_bits == 8 else (side & 15, side)
        sides.append(tuple(part.float().view(rows, -1, width) for part in parts))
    return PerTokenTile(sides[0], sides[1], k_scale, k_min, v_scale, v_min)


def _dense(codes: tuple[torch.Tensor, ...], scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """[rows, tokens, head_dim] fp32, in memory of its own"""
    rows, _, pages, page_size = scale.shape
    if len(codes) == 1:
        whole = codes[0]
    else:
        whole = torch.cat((codes[0], (codes[1] - codes[0]) * 0.0625), dim=-1)
    by_page = whole.view(rows, pages, page_size, -1)
    return (by_page * scale.squeeze(1)[..., None]).add_(low.squeeze(1)[..., None]).flatten(1, 2)


def _encode_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., page_size, head_dim] -> codes [..., page_size * head_dim * bits / 8] uint8,
    scale and minimum [..., 2 * page_size * 2] uint8"""
    levels = float(2**bits - 1)
    half = x.float() * 0.5
    stored_min = _round_down_to_bf16(half.amin(-1) * 2.0)
    half_min = stored_min * 0.5
    half_scale = (half.amax(-1) - half_min) / levels
    scale = _round_up_to_bf16((half_scale * 2.0).clamp_min(SCALE_FLOOR))
    # floor(t + 0.5) rather than round-half-even: the same in every backend
    codes = half.sub_(half_min[..., None]).div_((scale * 0.5)[..., None])
    codes = codes.add_(0.5).floor_().clamp_(0.0, levels).to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=-1)
        codes = low | (high << 4)
    meta = torch.stack((scale, stored_min), dim=-2).to(torch.bfloat16)
    return codes.flatten(-2), meta.flatten(-2).view(torch.uint8)


def _round_up_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """Positive fp32 numbers to the next bf16 number above, still as fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & _UPPER_HALF).view(torch.float32)


def _round_down_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """fp32 numbers to the next bf16 number below, at least bf16's least, still as fp32."""
    bits = x.contiguous().view(torch.int32)
    # Truncating the magnitude rounds towards zero: down for x > 0 only.
    away = torch.where(x < 0, 0xFFFF, 0).to(torch.int32)
    return ((bits + away) & _UPPER_HALF).view(torch.float32).clamp_min(-BF16_MAX)
