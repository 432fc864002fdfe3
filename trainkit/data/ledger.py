"""Every token accounted for: two sums that must come out exactly, kept with the rows and shown on every run.

What was read went somewhere:       read + repeated = trained + masked + truncated + dropped
What a row is made of is known:     rows x sequence_length = trained + masked + separators + overlap + padding

``trained`` and ``masked`` are the same numbers in both. Separators are added by us and repeated overlap was counted
where it stood first, so neither was read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class SourceShare:
    """What one source gives to the rows; ``passes`` is how often its trained tokens are in them, on average."""

    path: str
    weight: float | None
    documents: int
    trained_tokens: int
    share: float
    passes: float


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Counts of tokens where nothing else is said. A token counts once for each time that it stands in a row.

    Padding is counted up to ``sequence_length`` for every row. A run with ``strategy: none`` pads only to the longest
    row of its micro-batch, so it computes at most this much padding.
    """

    sequence_length: int
    rows: int
    pieces: int
    documents: int
    """Documents in the rows, each counted once."""
    read: int
    """Tokens of all documents, each document once, without separators that were added."""
    repeated: int = 0
    """Tokens of documents that a source's weight calls for again."""
    trained: int = 0
    """Targets among the tokens read."""
    masked: int = 0
    """Tokens read that are only context: prompts, and the first token of every segment."""
    truncated: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Tokens left out, by reason."""
    separators: int = 0
    separators_trained: int = 0
    overlap: int = 0
    overlap_trained: int = 0
    padding: int = 0
    examples_read: int = 0
    examples_dropped: Mapping[str, int] = field(default_factory=dict)
    """Examples of which nothing is left, by reason."""
    sources: tuple[SourceShare, ...] = ()

    @property
    def slots(self) -> int:
        """Places for tokens in all rows."""
        return self.rows * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens in all rows: every slot that is not padding."""
        return self.slots - self.padding

    @property
    def trained_targets(self) -> int:
        """Targets of one epoch: what the loss is a mean over."""
        return self.trained + self.separators_trained + self.overlap_trained

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token."""
        return self.tokens / self.slots if self.slots else 0.0

    @property
    def examples_kept(self) -> int:
        """Examples of which at least a piece is in the rows."""
        return self.examples_read - sum(self.examples_dropped.values())

    def check(self) -> None:
        """Raise AssertionError, a bug of trainkit, where a sum does not come out."""
        here = self.trained + self.masked
        identities = {
            "read + repeated = trained + masked + truncated + dropped": (
                self.read + self.repeated,
                here + self.truncated + sum(self.dropped.values()),
            ),
            "rows x sequence_length = trained + masked + separators + overlap + padding": (
                self.slots,
                here + self.separators + self.overlap + self.padding,
            ),
            "examples kept = documents": (self.examples_kept, self.documents),
        }
        for identity, (left, right) in identities.items():
            if left != right:
                raise AssertionError(f"the ledger does not balance: {identity}: {left} is not {right}")
        counts = [value for value in asdict(self).values() if isinstance(value, int)]
        counts += [*self.dropped.values(), *self.examples_dropped.values()]
        if min(counts) < 0 or self.separators_trained > self.separators or self.overlap_trained > self.overlap:
            raise AssertionError(f"the ledger holds a count that cannot be: {self}")

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for ledger.json, with the sums that follow from them; :meth:`from_json` reads it back."""
        value = asdict(self)
        value["sources"] = [asdict(source) for source in self.sources]
        return value | {
            "slots": self.slots,
            "tokens": self.tokens,
            "trained_targets": self.trained_targets,
            "fill": self.fill,
            "examples_kept": self.examples_kept,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The ledger that :meth:`to_json` wrote; the sums it added are computed anew. Raises TypeError or KeyError."""
        known = {one.name: value[one.name] for one in fields(cls)}
        return cls(**known | {"sources": tuple(SourceShare(**source) for source in value["sources"])})

    def lines(self, *, sources: bool = True) -> list[str]:
        """The ledger as aligned text: the examples, then the two sums, then the sources where there are several.

        ``sources=False`` leaves those out.
        """
        counts = [("examples read", self.examples_read, "")]
        counts += [(f"  dropped: {reason}", -count, "") for reason, count in self.examples_dropped.items()]
        counts += [("documents in rows", self.documents, f"{self.pieces:,} pieces")]
        counts += [("tokens read", self.read, "")]
        counts += [("  repeated by weight", self.repeated, "")] if self.repeated else []
        counts += [("  truncated", -self.truncated, self._of_read(self.truncated))] if self.truncated else []
        counts += [(f"  dropped: {reason}", -count, self._of_read(count)) for reason, count in self.dropped.items()]
        counts += [
            ("trained", self.trained, ""),
            ("masked (context only)", self.masked, ""),
            ("separators added", self.separators, f"{self.separators_trained:,} of them trained"),
            (
                "overlap repeated",
                self.overlap,
                f"{self._of_read(self.overlap)}, {self.overlap_trained:,} of them trained",
            ),
            ("padding", self.padding, f"{1 - self.fill:.2%} of the slots"),
            ("slots", self.slots, f"{self.rows:,} rows of {self.sequence_length:,}"),
            (
                "trained targets",
                self.trained_targets,
                f"{self.trained_targets / max(1, self.tokens):.1%} of the tokens",
            ),
        ]
        width = max(len(f"{count:,}") for _, count, _ in counts)
        label_width = max(len(label) for label, _, _ in counts)
        lines = [f"{label:<{label_width}}  {count:>{width},}  {note}".rstrip() for label, count, note in counts]
        if sources and len(self.sources) > 1:
            lines += [
                f"{source.path}: {source.trained_tokens:,} trained tokens, {source.share:.1%} of the mix, "
                f"{source.passes:.2f} passes"
                for source in self.sources
            ]
        return lines

    def _of_read(self, tokens: int) -> str:
        """``tokens`` beside all that was read, repetitions included."""
        return f"{tokens / max(1, self.read + self.repeated):.2%} of the tokens read"
