"""Which documents stand in which rows, how often, and the ledger of it: numbers about documents in, an index out.

held out or not → cut into pieces → pieces without a target left out → copies by weight → bins → ledger

Every step costs a few vectorised passes over documents and pieces; of the tokens only the flags of long documents are
read, a block at a time. At its peak a plan holds about 80 bytes for each document that is not cut.

Legend: N documents (of one part), P pieces, S sources, R rows, Q ranges of tokens, K tokens of the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.data.ledger import Ledger, SourceShare
from trainkit.data.packed_store import PlacedPieces, PlannedRows
from trainkit.data.packing import best_fit, cut, one_a_bin, position_type
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trainkit.data.packed_store import Documents
    from trainkit.data.packing import Pieces, Positions
    from trainkit.recipe.schema import Packing, Source

    Int32 = NDArray[np.int32]
    Int64 = NDArray[np.int64]
    Bool = NDArray[np.bool_]

NO_TARGET = "no trained token"
TRUNCATED_TO_NO_TARGET = "truncated to no trained token"
PIECE_WITHOUT_TARGET = "piece of a long document without a trained token"
TOO_LONG = "longer than sequence_length"
PIECES_SUMMED_AT_ONCE = 2**20
TOKENS_COUNTED_AT_ONCE = 2**22
"""Flags that still lie in a cache when they are counted, after they were compared with their sums."""


@dataclass(frozen=True)
class Selection:
    """The documents of one part (training or evaluation) and what its sources lost before there were documents."""

    sources: Sequence[Source]
    first_source: int
    """Number of ``sources[0]`` among all sources of the store."""
    documents_N: Int64
    """Numbers of the documents in the store."""
    examples_dropped: Mapping[str, int]


@dataclass(frozen=True)
class _CountedPieces:
    """Pieces with what the ledger counts of each; all arrays (P,). ``pieces.document_P`` counts within the part."""

    pieces: Pieces
    targets_P: Int32
    """Trained tokens, separator and trained overlap included."""
    overlap_targets_P: Int32
    separator_P: Bool
    separator_target_P: Bool


def held_out(digests_N: NDArray[np.uint64], fraction: float, seed: int) -> Bool:
    """Which documents are held out: those whose digest, mixed with ``seed``, falls into the first ``fraction``.

    It depends on nothing but the document's own content and the seed, so equal examples stay together and new examples
    move none of the old ones. The digest is already as good as random; the mix (the 64-bit finaliser of splitmix64,
    Steele, Lea and Flood 2014) makes every seed choose independently of every other.

    >>> held_out(np.arange(12, dtype=np.uint64), 0.25, seed=0).nonzero()[0].tolist()
    [1, 4, 5]
    """
    mixed_N = _mixed(digests_N ^ _mixed(np.array([seed], np.int64).astype(np.uint64)))
    return mixed_N < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which every bit of the value moves about half of the bits of the result."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def plan_rows(documents: Documents, selection: Selection, packing: Packing, seed: int) -> PlannedRows:
    """Cut, weigh and pack the selected documents; the ledger has been checked.

    Raises DataError where a document is too long and the recipe says ``long_documents: error``, where nothing is left
    to train, and where a source with a weight has no trained token.
    """
    lengths_N = _narrow(np.diff(documents.offsets_N)[selection.documents_N])
    if packing.long_documents == "error":
        _refuse_long_documents(documents, selection.documents_N, lengths_N, packing.sequence_length)
    every = _cut_and_count(documents, selection.documents_N, lengths_N, packing)
    in_rows_P = _narrow(np.flatnonzero(every.targets_P))
    if not in_rows_P.size:
        raise DataError(
            f"{_names(selection.sources)}: of {lengths_N.size} documents none has a trained token in its rows; "
            "see `trainkit inspect-data`, data.train_on and packing.long_documents"
        )
    source_N = documents.sources_N[selection.documents_N] - selection.first_source
    targets_N = _sums_by_document(every.pieces.document_P, every.targets_P, lengths_N.size)
    copies_N = copies_by_weight(targets_N, source_N, selection.sources, seed)
    if copies_N.max() > 1:
        in_rows_P = np.repeat(in_rows_P, copies_N[every.pieces.document_P[in_rows_P]])
    sources = _shares(selection.sources, source_N, targets_N, copies_N)
    del source_N, targets_N

    lengths_P = every.pieces.length_P[in_rows_P]
    best = packing.strategy == "best-fit"
    bins = best_fit(lengths_P, packing.sequence_length, seed) if best else one_a_bin(lengths_P.size)
    ledger = _account(
        every,
        in_rows_P,
        selection,
        words_N=lengths_N - documents.separators_N[selection.documents_N],
        untrained_N=documents.targets_N[selection.documents_N] == 0,
        copies_N=copies_N,
        rows=len(bins),
        packing=packing,
        sources=sources,
    )
    ledger.check()
    in_order_P = in_rows_P[bins.order_P]
    return PlannedRows(
        pieces=_placed(documents, selection.documents_N, every.pieces, in_order_P),
        offsets_R=bins.offsets_B,
        targets_R=np.add.reduceat(every.targets_P[in_order_P], bins.offsets_B[:-1]),
        sequence_length=packing.sequence_length,
        train_on_overlap=packing.train_on_overlap,
        ledger=ledger,
    )


def _placed(documents: Documents, chosen_N: Int64, pieces: Pieces, in_order_P: Positions) -> PlacedPieces:
    """The pieces ``in_order_P``, counted within the store and no longer within the part."""
    # First in the order of the store, where neighbours lie beside each other, and then once in that of the rows.
    document_P = chosen_N.astype(position_type(len(documents)))[pieces.document_P]
    begin_P = documents.offsets_N[document_P].astype(position_type(documents.trained_K.size), copy=False)
    begin_P += pieces.start_P
    return PlacedPieces(
        document_P[in_order_P], begin_P[in_order_P], pieces.length_P[in_order_P], pieces.overlap_P[in_order_P]
    )


def copies_by_weight(
    targets_N: Positions, source_N: NDArray[np.integer], sources: Sequence[Source], seed: int
) -> Int32:
    """How often each document appears: at least once, and so often that trained tokens stand as the weights say.

    The source that has most for its weight appears once; the others are repeated in whole passes and a part of a pass
    that ``seed`` draws. Without weights everything appears once. Raises DataError for a source with a weight and
    nothing to train.
    """
    copies_N = np.ones(targets_N.size, np.int32)
    weights = [source.weight for source in sources]
    if None in weights or len(sources) == 1:
        return copies_N
    weights_S = np.array(weights, np.float64)
    totals_S = np.bincount(source_N, targets_N, minlength=len(sources))
    for source, total in zip(sources, totals_S.tolist(), strict=True):
        if not total:
            raise DataError(
                f"{source.path}: no trained token, so its weight {source.weight} cannot be met; leave it out"
            )
    wanted_S = weights_S * (totals_S / weights_S).max()
    for index, (wanted, total) in enumerate(zip(wanted_S.tolist(), totals_S.tolist(), strict=True)):
        passes = max(1, int(wanted / total + 1e-9))
        members = np.flatnonzero((source_N == index) & (targets_N > 0))
        copies_N[members] = passes
        drawn = np.random.default_rng([seed, index]).permutation(members)
        reached = np.concatenate(([0], np.cumsum(targets_N[drawn], dtype=np.int64)))
        extra = int(np.argmin(np.abs(reached - (wanted - passes * total))))
        copies_N[drawn[:extra]] += 1
    return copies_N


def _refuse_long_documents(documents: Documents, chosen_N: Int64, lengths_N: Positions, sequence_length: int) -> None:
    too_long = np.flatnonzero(lengths_N > sequence_length)
    if too_long.size:
        first = int(too_long[0])
        raise DataError(
            f"{documents.place(int(chosen_N[first]))}: {int(lengths_N[first])} tokens, and packing.sequence_length is "
            f"{sequence_length} ({too_long.size} such documents, the longest has {int(lengths_N.max())}); "
            "raise it, or set packing.long_documents: split"
        )


def _cut_and_count(documents: Documents, chosen_N: Int64, lengths_N: Positions, packing: Packing) -> _CountedPieces:
    """All pieces of the selected documents, each once."""
    policy = "split" if packing.long_documents == "error" else packing.long_documents
    # An overlap that a short row has no room for matters only where something is split.
    overlap = packing.overlap if policy == "split" and lengths_N.max(initial=0) > packing.sequence_length else 0
    pieces = cut(lengths_N, packing.sequence_length, policy, overlap)
    document_P = pieces.document_P
    # Right for whole documents; those of their parts are counted below.
    targets_P = np.minimum(documents.targets_N[chosen_N], packing.sequence_length).astype(np.int32)[document_P]
    overlap_targets_P = np.zeros(len(pieces), np.int32)
    parts = np.flatnonzero(pieces.length_P < lengths_N[document_P])
    if parts.size:
        in_store_Q = chosen_N[document_P[parts]]
        begin_Q = documents.offsets_N[in_store_Q] + pieces.start_P[parts]
        end_Q = begin_Q + pieces.length_P[parts]
        # The first token of a piece has nothing before it to be predicted from.
        new_Q = begin_Q + np.maximum(pieces.overlap_P[parts], 1)
        targets_P[parts] = _targets_between(documents, in_store_Q, new_Q, end_Q)
        if packing.train_on_overlap and overlap:
            overlap_targets_P[parts] = _targets_between(documents, in_store_Q, begin_Q + 1, new_Q)
            targets_P[parts] += overlap_targets_P[parts]

    separator_P = documents.separators_N[chosen_N][document_P]
    separator_P &= pieces.start_P + pieces.length_P == lengths_N[document_P]
    separator_target_P = separator_P & documents.trained_separators_N[chosen_N][document_P] & (pieces.length_P > 1)
    return _CountedPieces(pieces, targets_P, overlap_targets_P, separator_P, separator_target_P)


def _targets_between(documents: Documents, in_store_Q: Int64, begin_Q: Int64, end_Q: Int64) -> Int64:
    """Trained tokens from ``begin_Q`` to ``end_Q``, behind the first token of the document ``in_store_Q``."""
    targets_Q = documents.targets_N[in_store_Q]
    # Text that is trained throughout, and text that is not trained at all, need no look at their flags.
    all_Q = targets_Q == documents.offsets_N[in_store_Q + 1] - documents.offsets_N[in_store_Q] - 1
    counts_Q = np.where(all_Q, end_Q - begin_Q, 0)
    mixed = np.flatnonzero(~all_Q & (targets_Q > 0))
    if mixed.size:
        counts_Q[mixed] = count_trained(documents, begin_Q[mixed], end_Q[mixed])
    return counts_Q


def count_trained(documents: Documents, begin_Q: Int64, end_Q: Int64) -> Int64:
    """How many tokens of the store are trained from ``begin_Q`` to ``end_Q``; both rise, and ranges may overlap.

    The flags are read in blocks, and only where there are ranges: what is in memory at once does not grow with them.
    Raises StoreUnusable for damage.
    """
    counts_Q = np.zeros(begin_Q.size, np.int64)
    trained_K = documents.trained_K
    for start in range(0, trained_K.size, TOKENS_COUNTED_AT_ONCE):
        stop = min(start + TOKENS_COUNTED_AT_ONCE, trained_K.size)
        here = slice(int(np.searchsorted(end_Q, start, "right")), int(np.searchsorted(begin_Q, stop, "left")))
        if here.start >= here.stop:
            continue
        documents.check_trained(max(start, int(begin_Q[here.start])), min(stop, int(end_Q[here.stop - 1])))
        flags = trained_K[start:stop]
        if flags.size % 8:
            flags = np.pad(flags, (0, 8 - flags.size % 8))
        # Eight flags at a time are counted as the bits of one word.
        words = flags.view("<u8")
        before_words = np.zeros(words.size + 1, np.int32)
        np.cumsum(np.bitwise_count(words), out=before_words[1:])
        for edge_Q, sign in ((end_Q, 1), (begin_Q, -1)):
            inside = np.clip(edge_Q[here], start, stop) - start
            word, bits = inside >> 3, (inside & 7).astype(np.uint64) << np.uint64(3)
            begun = words[np.minimum(word, words.size - 1)] & ((np.uint64(1) << bits) - np.uint64(1))
            counts_Q[here] += sign * (before_words[word] + np.bitwise_count(begun))
    return counts_Q


def _sums_by_document(document_P: Positions, values_P: NDArray[np.integer], documents: int) -> Positions:
    """The sum over the pieces of each document; ``document_P`` rises. In blocks, for numpy sums in wider numbers."""
    sums_N = np.zeros(documents, np.int64)
    for start in range(0, document_P.size, PIECES_SUMMED_AT_ONCE):
        block = slice(start, start + PIECES_SUMMED_AT_ONCE)
        first = int(document_P[start])
        sums = np.bincount(document_P[block] - first, values_P[block])
        sums_N[first : first + sums.size] += sums.astype(np.int64)
    return _narrow(sums_N)


def _narrow(values: Int64) -> Positions:
    """The same numbers, in 32 bits where they fit."""
    return values.astype(position_type(int(values.max(initial=0))), copy=False)


def _account(
    every: _CountedPieces,
    in_rows_P: Positions,
    selection: Selection,
    *,
    words_N: Positions,
    untrained_N: Bool,
    copies_N: Int32,
    rows: int,
    packing: Packing,
    sources: tuple[SourceShare, ...],
) -> Ledger:
    """The ledger of ``every`` piece, where ``in_rows_P`` stand in rows, each as often as it is named.

    A document has ``words_N`` tokens that were read, and none of them is trained where it is ``untrained_N``.
    """
    pieces, documents = every.pieces, words_N.size
    document_in_rows_P = pieces.document_P[in_rows_P]
    in_rows_N, has_piece_N = np.zeros(documents, np.bool_), np.zeros(documents, np.bool_)
    in_rows_N[document_in_rows_P] = True
    has_piece_N[pieces.document_P] = True
    # Tokens of each piece that were read and stand here first: without overlap and separator.
    words_P = pieces.length_P - pieces.overlap_P - every.separator_P
    cut_away_N = words_N - _sums_by_document(pieces.document_P, words_P, documents)
    dropped: dict[str, int] = {}
    examples_dropped = dict(selection.examples_dropped)
    truncated = 0
    if packing.long_documents == "drop":
        _add(dropped, TOO_LONG, int(cut_away_N.sum(dtype=np.int64)))
    else:
        truncated = int(np.multiply(cut_away_N, copies_N, dtype=np.int64).sum())

    # A piece that is left out is left out of every copy of its document.
    left_out = np.flatnonzero(every.targets_P == 0)
    left_out_document_P = pieces.document_P[left_out]
    left_out_words_P = words_P[left_out].astype(np.int64) * copies_N[left_out_document_P]
    untrained_P = untrained_N[left_out_document_P]
    for reason, of_N, of_P in (
        (NO_TARGET, untrained_N, untrained_P),
        (_reason_for_lost_targets(packing), ~untrained_N, ~untrained_P),
    ):
        _add(dropped, reason, int(left_out_words_P[of_P].sum()))
        _add(examples_dropped, reason, int(np.count_nonzero(~in_rows_N & has_piece_N & of_N)))
    _add(examples_dropped, TOO_LONG, int(np.count_nonzero(~has_piece_N)))

    def in_rows(values_P: NDArray[Any]) -> int:
        return int(values_P[in_rows_P].sum(dtype=np.int64))

    separators_trained = in_rows(every.separator_target_P)
    overlap_trained = in_rows(every.overlap_targets_P)
    trained = in_rows(every.targets_P) - separators_trained - overlap_trained
    read = int(words_N.sum(dtype=np.int64))
    return Ledger(
        sequence_length=packing.sequence_length,
        rows=rows,
        pieces=in_rows_P.size,
        documents=int(np.count_nonzero(in_rows_N)),
        read=read,
        repeated=int(np.multiply(words_N, copies_N, dtype=np.int64).sum()) - read,
        trained=trained,
        masked=in_rows(words_P) - trained,
        truncated=truncated,
        dropped=dropped,
        separators=in_rows(every.separator_P),
        separators_trained=separators_trained,
        overlap=in_rows(pieces.overlap_P),
        overlap_trained=overlap_trained,
        padding=rows * packing.sequence_length - in_rows(pieces.length_P),
        examples_read=documents + sum(selection.examples_dropped.values()),
        examples_dropped=examples_dropped,
        sources=sources,
    )


def _reason_for_lost_targets(packing: Packing) -> str:
    return TRUNCATED_TO_NO_TARGET if packing.long_documents == "truncate" else PIECE_WITHOUT_TARGET


def _add(counts: dict[str, int], reason: str, count: int) -> None:
    if count:
        counts[reason] = counts.get(reason, 0) + count


def _shares(
    sources: Sequence[Source], source_N: NDArray[np.integer], targets_N: Positions, copies_N: Int32
) -> tuple[SourceShare, ...]:
    once_S = np.bincount(source_N, targets_N, len(sources)).astype(np.int64).tolist()
    mixed_S = (
        np.bincount(source_N, np.multiply(targets_N, copies_N, dtype=np.float64), len(sources))
        .astype(np.int64)
        .tolist()
    )
    documents_S = np.bincount(source_N, targets_N > 0, len(sources)).astype(np.int64).tolist()
    total = sum(mixed_S)
    return tuple(
        SourceShare(
            path=source.path,
            weight=source.weight,
            documents=documents,
            trained_tokens=mixed,
            share=mixed / total,
            passes=mixed / once if once else 0.0,
        )
        for source, documents, once, mixed in zip(sources, documents_S, once_S, mixed_S, strict=True)
    )


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.path for source in sources)
