"""Prompts of a wished length: token ids where the endpoint takes and gives them, else words.

Without the model's tokenizer nobody can count tokens here. Ids that its `/tokenize` route has given are valid, and
a list of n of them is n tokens. Of words one can only say how many tokens they had on average: what the server's
`usage` counts is what is reported, the wish beside it. Prompts are random, so that no cache of prefixes knows them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city name president team minute idea body "
    "information back parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education stone river paper music road wind field "
    "table letter garden market window"
)
"""What a tokenizer is asked about, and what the mean of a word's tokens is taken of."""
WORDS = tuple(TEXT.split())

Prompt = str | list[int]


class Prompts:
    """Makes prompts. `ids` are valid token ids; else a prompt of n words has `fixed` + n * `each` tokens."""

    def __init__(self, seed: int, ids: Sequence[int] = (), *, fixed: float = 0.0, each: float = 1.0) -> None:
        self._draw = random.Random(f"prompts {seed}")  # noqa: S311 -- load, not secrets
        self._ids = ids
        self._fixed = fixed
        self._each = each

    @property
    def exact(self) -> bool:
        """Whether a prompt has the tokens that were wished."""
        return bool(self._ids)

    def make(self, tokens: int) -> Prompt:
        """Return a prompt of so many tokens, or as near as words come."""
        if self._ids:
            return self._draw.choices(self._ids, k=tokens)
        return " ".join(self._draw.choices(WORDS, k=max(1, round((tokens - self._fixed) / self._each))))
