"""The output of the model that is not there: a cycle through ordinary token ids.

A token's successor depends on that token alone. So the prompt determines the whole output, and a
token that is lost, repeated or from another stream breaks the chain.
"""

from __future__ import annotations

# In the embedded model's tokenizer these are pieces of words, punctuation and code; none of
# them is a control token.
FIRST_ID = 1024
NUM_IDS = 1 << 15
# x -> (MULTIPLIER x + INCREMENT) mod NUM_IDS visits every x: the modulus is a power of two, the
# multiplier 1 mod 4, the increment odd (Hull and Dobell, 1962).
MULTIPLIER = 20_077
INCREMENT = 12_345


def successor(token_id: int) -> int:
    """The token after `token_id`."""
    return FIRST_ID + (MULTIPLIER * (token_id - FIRST_ID) + INCREMENT) % NUM_IDS


def chain(token_id: int, count: int) -> list[int]:
    """The `count` tokens after `token_id`."""
    tokens = []
    for _ in range(count):
        token_id = successor(token_id)
        tokens.append(token_id)
    return tokens


class Checker:
    """Follows the output of one request.

    last_token: of the prompt
    """

    def __init__(self, last_token: int, max_tokens: int) -> None:
        self._next = successor(last_token)
        self._max_tokens = max_tokens
        self.seen = 0

    def take(self, token_ids: list[int]) -> None:
        """Raises ValueError at the first token that was not sampled here."""
        for token_id in token_ids:
            if token_id != self._next:
                raise ValueError(
                    f"output token {self.seen} is {token_id}, expected {self._next}: a token was "
                    "lost, repeated or delivered to the wrong stream"
                )
            self._next = successor(token_id)
            self.seen += 1

    def end(self) -> None:
        """Raises ValueError unless all tokens have arrived."""
        if self.seen != self._max_tokens:
            raise ValueError(f"expected {self._max_tokens} output tokens, got {self.seen}")
