"""What operators allocate on a GPU besides their arguments and their results, in bytes.

Engines leave it free and `kvmesh plan` counts it, so it is arithmetic without torch. The operators
divide their work by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.kernels.formats.base import KVFormat

# Sealed keys that one program reads. In decode a part of 4 query heads costs 4 KiB of output for
# 70 KiB of 4-bit pages. In prefill a part must be worth writing and merging 128 rows.
DECODE_CHUNK_TOKENS = 512
PREFILL_CHUNK_TOKENS = 4096
# Parts of decode whose results are held at a time, unless one sequence has more: 64 MiB for 32
# heads of 128 channels. What has more is computed in several rounds.
MAX_SLOTS = 4096
# Outputs of parts of prefill that are held at a time, unless one block has more.
MAX_PREFILL_BYTES = 64 << 20
# Rows of a block of prefill for each KV head, at most, unless more query heads share one.
MAX_BLOCK_ROWS = 128
# Tokens of formats for comparison that are held decoded at a time, unless one sequence has more,
# and those that are decoded at once.
DECODED_TOKENS, DECODED_AT_ONCE = 65536, 16384
# Keys of latents that a program reads for a decoding sequence, and bytes of results that are held
# at a time, unless one sequence has more.
LATENT_PART_TOKENS, MAX_LATENT_BYTES = 1024, 256 << 20
# Tokens of far keys (`attention/far.py`) that are decoded at a time: 256 MiB for 8 KV heads of 128
# channels.
FAR_TOKENS = 65536
# Query rows per KV head from which on decoding pays. By arithmetic for an H100 (3.35 TB/s,
# 989 TFLOPs): for one key and value of 128 channels decoding moves 1.2 KiB (read the page, write
# 16 bits per number, read them again), 0.4 ns, or twice that at half the bandwidth. A row takes
# 1.85 ps where kernels reach 28% of the tensor cores, 1.5 ps with FlashAttention 2's 35%. So it
# pays from 1,000 to 2,000 rows on.
MIN_FAR_ROWS = 2048
# Of a slice of weights in few bits that a product with many rows has decoded at a time.
DECODED_WEIGHT_BYTES = 64 << 20

FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """A layer's attention on one rank, and the largest step.

    max_queries: new tokens of a step; kinds: of layers that differ in their sliding window, whose
        results of parts are held apart
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int
    max_seq_len: int
    max_queries: int
    kinds: int = 1

    def workspace_bytes(self, fmt: KVFormat, *, far: bool) -> int:
        """An upper bound, reached by the longest sequence. far: chunks may have far keys"""
        if fmt.values_in_keys:
            return self._latent_bytes(fmt.values_in_keys)
        parts = self.kinds * (self._decode_bytes + self._prefill_bytes)
        if not fmt.has_kernels:
            # While pages are decoded, their numbers exist a few times in fp32.
            tokens = max(DECODED_TOKENS, self.max_seq_len) * self.dtype_bytes
            parts += 2 * self.num_kv_heads * self.head_dim * (tokens + DECODED_AT_ONCE * 32)
        return parts + (self._far_bytes if far else 0)

    @property
    def _decode_bytes(self) -> int:
        slots = max(MAX_SLOTS, -(-self.max_seq_len // DECODE_CHUNK_TOKENS) + 1)
        return slots * self.num_heads * (self.head_dim + 1) * FP32_BYTES

    @property
    def _prefill_bytes(self) -> int:
        group = self.num_heads // self.num_kv_heads
        rows = self.num_kv_heads * max(MAX_BLOCK_ROWS, 1 << (group - 1).bit_length())
        of_block = -(-self.max_seq_len // PREFILL_CHUNK_TOKENS)
        items = max(MAX_PREFILL_BYTES // (rows * self.head_dim * FP32_BYTES), of_block)
        return items * rows * (self.head_dim + 1) * FP32_BYTES

    @property
    def _far_bytes(self) -> int:
        """The workspace, and for each row the sum so far, a piece's result, and numbers in fp32."""
        if self.max_queries * (self.num_heads // self.num_kv_heads) < MIN_FAR_ROWS:
            return 0
        tokens = min(self.max_seq_len, FAR_TOKENS)
        held = 2 * self.num_kv_heads * tokens * self.head_dim * self.dtype_bytes
        row = self.head_dim * (FP32_BYTES + 2 * self.dtype_bytes) + 4 * FP32_BYTES
        return held + self.max_queries * self.num_heads * row

    def _latent_bytes(self, values: int) -> int:
        """Results of parts, which merged exist once more."""
        parts = self.max_seq_len // LATENT_PART_TOKENS + 1
        return 2 * max(MAX_LATENT_BYTES, parts * self.num_heads * (values + 1) * FP32_BYTES)
