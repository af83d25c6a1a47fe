"""What an evaluation yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DomainEvaluation:
    """How well a model predicts one domain's text.

    Attributes:
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes that they spell.
        nll: mean of -ln p(token), in nats.
        perplexity: exp(nll).
        bits_per_byte: sum of -log2 p(token) over ``bytes``; comparable between tokenizers.
        kl: mean KL(reference || model) of the next-token distributions, in nats per token.
        top1_agreement: share of positions where model and reference rank the same token first.
    """

    tokens: int
    bytes: int
    nll: float
    perplexity: float
    bits_per_byte: float
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measures.

    Attributes:
        domains: by domain name.
        total: all text as one domain: weighted by tokens, ``bits_per_byte`` by bytes.
        mean: every domain counts the same; its perplexity is the exponential of its nll, its
            ``tokens`` and ``bytes`` are those of all text.
        tokens_per_second: of the forward pass alone, compiled (see ``forward_speed``); None where
            it was not measured.
        seq_len: S, tokens per row.
        batch_size: B, rows per step.
    """

    domains: dict[str, DomainEvaluation]
    total: DomainEvaluation
    mean: DomainEvaluation
    tokens_per_second: float | None
    seq_len: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` gives back an equal evaluation."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Evaluation:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: not such a dict.
        """
        try:
            domains = {name: DomainEvaluation(**d) for name, d in raw["domains"].items()}
            rest = {key: DomainEvaluation(**raw[key]) for key in ("total", "mean")}
            return cls(**{**raw, "domains": domains, **rest})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not an evaluation: {error}") from error
