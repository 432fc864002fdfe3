"""Which documents stand in which rows, how often, and the ledger of it: numbers about documents in, an index out.

held out or not → cut into pieces → pieces without a target left out → copies by weight → bins → ledger

Legend: N documents (of one part), P pieces, S sources, R rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainkit.data.ledger import Ledger, SourceShare
from trainkit.data.packed_store import PlannedRows
from trainkit.data.packing import Pieces, best_fit, cut, one_a_bin
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trainkit.data.packed_store import Documents
    from trainkit.recipe.schema import Packing, Source

    Int64 = NDArray[np.int64]
    Bool = NDArray[np.bool_]

NO_TARGET = "no trained token"
TRUNCATED_TO_NO_TARGET = "truncated to no trained token"
PIECE_WITHOUT_TARGET = "piece of a long document without a trained token"
TOO_LONG = "longer than sequence_length"


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
    targets_P: Int64
    """Trained tokens, separator and trained overlap included."""
    overlap_targets_P: Int64
    separator_P: Bool
    separator_target_P: Bool


def held_out(digests_N: NDArray[np.uint64], fraction: float, seed: int) -> Bool:
    """Which documents are held out: those whose digest, hashed with ``seed``, falls into the first ``fraction``.

    It depends on nothing but the document's own content and the seed, so equal examples stay together and new examples
    move none of the old ones.
    """
    threshold = int(fraction * 2**64)
    start = hashlib.sha256(f"held out {seed} ".encode())
    held = np.empty(digests_N.size, np.bool_)
    for index, digest in enumerate(digests_N.tolist()):
        hashed = start.copy()
        hashed.update(digest.to_bytes(8, "little"))
        held[index] = int.from_bytes(hashed.digest()[:8], "big") < threshold
    return held


def plan_rows(documents: Documents, selection: Selection, packing: Packing, seed: int) -> PlannedRows:
    """Cut, weigh and pack the selected documents; the ledger has been checked.

    Raises DataError where a document is too long and the recipe says ``long_documents: error``, where nothing is left
    to train, and where a source with a weight has no trained token.
    """
    chosen_N = selection.documents_N
    lengths_N = np.diff(documents.offsets_N)[chosen_N]
    if packing.long_documents == "error":
        _refuse_long_documents(documents, chosen_N, lengths_N, packing.sequence_length)
    every = _cut_and_count(documents, chosen_N, lengths_N, packing)
    kept = _take(every, every.targets_P > 0)
    if not len(kept.pieces):
        raise DataError(
            f"{_names(selection.sources)}: of {chosen_N.size} documents none has a trained token in its rows; "
            "see `trainkit inspect-data`, data.train_on and packing.long_documents"
        )
    source_N = documents.sources_N[chosen_N] - selection.first_source
    targets_N = np.bincount(kept.pieces.document_P, kept.targets_P, minlength=chosen_N.size).astype(np.int64)
    copies_N = copies_by_weight(targets_N, source_N, selection.sources, seed)

    repeat_P = np.repeat(np.arange(len(kept.pieces)), copies_N[kept.pieces.document_P])
    packed = _take(kept, repeat_P)
    number_of_pieces, lengths_P = len(packed.pieces), packed.pieces.length_P
    best = packing.strategy == "best-fit"
    bins = best_fit(lengths_P, packing.sequence_length, seed) if best else one_a_bin(number_of_pieces)
    ledger = _account(
        every,
        packed,
        selection,
        words_N=lengths_N - documents.separators_N[chosen_N],
        copies_N=copies_N,
        document_targets_N=documents.targets_N[chosen_N],
        rows=len(bins),
        packing=packing,
        sources=_shares(selection.sources, source_N, targets_N, copies_N),
    )
    ledger.check()
    in_rows = packed.pieces.take(bins.order_P)
    return PlannedRows(
        pieces=Pieces(chosen_N[in_rows.document_P], in_rows.start_P, in_rows.length_P, in_rows.overlap_P),
        offsets_R=bins.offsets_B,
        targets_R=np.add.reduceat(packed.targets_P[bins.order_P], bins.offsets_B[:-1]),
        sequence_length=packing.sequence_length,
        train_on_overlap=packing.train_on_overlap,
        ledger=ledger,
    )


def copies_by_weight(targets_N: Int64, source_N: NDArray[np.integer], sources: Sequence[Source], seed: int) -> Int64:
    """How often each document appears: at least once, and so often that trained tokens stand as the weights say.

    The source that has most for its weight appears once; the others are repeated in whole passes and a part of a pass
    that ``seed`` draws. Without weights everything appears once. Raises DataError for a source with a weight and
    nothing to train.
    """
    copies_N = np.ones(targets_N.size, np.int64)
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
        reached = np.concatenate(([0], np.cumsum(targets_N[drawn])))
        extra = int(np.argmin(np.abs(reached - (wanted - passes * total))))
        copies_N[drawn[:extra]] += 1
    return copies_N


def _refuse_long_documents(documents: Documents, chosen_N: Int64, lengths_N: Int64, sequence_length: int) -> None:
    too_long = np.flatnonzero(lengths_N > sequence_length)
    if too_long.size:
        first = int(too_long[0])
        raise DataError(
            f"{documents.place(int(chosen_N[first]))}: {int(lengths_N[first])} tokens, and packing.sequence_length is "
            f"{sequence_length} ({too_long.size} such documents, the longest has {int(lengths_N.max())}); "
            "raise it, or set packing.long_documents: split"
        )


def _cut_and_count(documents: Documents, chosen_N: Int64, lengths_N: Int64, packing: Packing) -> _CountedPieces:
    """All pieces of the selected documents, each once."""
    policy = "split" if packing.long_documents == "error" else packing.long_documents
    # An overlap that a short row has no room for matters only where something is split.
    overlap = packing.overlap if policy == "split" and lengths_N.max(initial=0) > packing.sequence_length else 0
    pieces = cut(lengths_N, packing.sequence_length, policy, overlap)
    begin_P = documents.offsets_N[chosen_N][pieces.document_P] + pieces.start_P
    whole_P = pieces.length_P == lengths_N[pieces.document_P]
    targets_P = documents.targets_N[chosen_N][pieces.document_P]
    overlap_targets_P = np.zeros(len(pieces), np.int64)
    trained_K = documents.trained_K
    for piece in np.flatnonzero(~whole_P).tolist():
        # The first token of a piece has nothing before it to be predicted from.
        begin, end = int(begin_P[piece]) + 1, int(begin_P[piece] + pieces.length_P[piece])
        new = max(begin, int(begin_P[piece] + pieces.overlap_P[piece]))
        if packing.train_on_overlap:
            overlap_targets_P[piece] = np.count_nonzero(trained_K[begin:new])
        targets_P[piece] = np.count_nonzero(trained_K[new:end]) + overlap_targets_P[piece]

    ends_here_P = pieces.start_P + pieces.length_P == lengths_N[pieces.document_P]
    separator_P = ends_here_P & documents.separators_N[chosen_N][pieces.document_P]
    separator_target_P = separator_P & (pieces.length_P > 1)
    last_P = begin_P[separator_target_P] + pieces.length_P[separator_target_P] - 1
    separator_target_P[separator_target_P] = trained_K[last_P]
    return _CountedPieces(pieces, targets_P, overlap_targets_P, separator_P, separator_target_P)


def _take(counted: _CountedPieces, index_P: Int64 | Bool) -> _CountedPieces:
    return _CountedPieces(
        counted.pieces.take(index_P),
        counted.targets_P[index_P],
        counted.overlap_targets_P[index_P],
        counted.separator_P[index_P],
        counted.separator_target_P[index_P],
    )


def _account(
    every: _CountedPieces,
    packed: _CountedPieces,
    selection: Selection,
    *,
    words_N: Int64,
    copies_N: Int64,
    document_targets_N: Int64,
    rows: int,
    packing: Packing,
    sources: tuple[SourceShare, ...],
) -> Ledger:
    """The ledger: ``every`` piece once, the ``packed`` ones as often as they stand in rows; ``words_N`` tokens read."""
    in_rows_N = np.bincount(packed.pieces.document_P, minlength=words_N.size) > 0
    cut_away_N = words_N - np.bincount(every.pieces.document_P, _new_words(every), words_N.size).astype(np.int64)
    dropped: dict[str, int] = {}
    truncated = 0
    if packing.long_documents == "drop":
        _add(dropped, TOO_LONG, int(cut_away_N.sum()))
    else:
        truncated = int((cut_away_N * copies_N).sum())

    # A piece that is left out is left out of every copy of its document.
    left_out = _take(every, every.targets_P == 0)
    left_out_words_P = _new_words(left_out) * copies_N[left_out.pieces.document_P]
    reason_N = np.where(document_targets_N == 0, NO_TARGET, _reason_for_lost_targets(packing))
    for reason in np.unique(reason_N).tolist():
        _add(dropped, reason, int(left_out_words_P[reason_N[left_out.pieces.document_P] == reason].sum()))

    examples_dropped = dict(selection.examples_dropped)
    has_piece_N = np.bincount(every.pieces.document_P, minlength=words_N.size) > 0
    for reason in np.unique(reason_N).tolist():
        _add(examples_dropped, reason, int(np.count_nonzero(~in_rows_N & has_piece_N & (reason_N == reason))))
    _add(examples_dropped, TOO_LONG, int(np.count_nonzero(~has_piece_N)))

    separators_trained = int(packed.separator_target_P.sum())
    overlap_trained = int(packed.overlap_targets_P.sum())
    trained = int(packed.targets_P.sum()) - separators_trained - overlap_trained
    return Ledger(
        sequence_length=packing.sequence_length,
        rows=rows,
        pieces=len(packed.pieces),
        documents=int(in_rows_N.sum()),
        read=int(words_N.sum()),
        repeated=int((words_N * (copies_N - 1)).sum()),
        trained=trained,
        masked=int(_new_words(packed).sum()) - trained,
        truncated=truncated,
        dropped=dropped,
        separators=int(packed.separator_P.sum()),
        separators_trained=separators_trained,
        overlap=int(packed.pieces.overlap_P.sum(dtype=np.int64)),
        overlap_trained=overlap_trained,
        padding=rows * packing.sequence_length - int(packed.pieces.length_P.sum(dtype=np.int64)),
        examples_read=words_N.size + sum(selection.examples_dropped.values()),
        examples_dropped=examples_dropped,
        sources=sources,
    )


def _new_words(counted: _CountedPieces) -> Int64:
    """Tokens of each piece that were read and stand here first: without overlap and separator."""
    pieces = counted.pieces
    return pieces.length_P.astype(np.int64) - pieces.overlap_P - counted.separator_P


def _reason_for_lost_targets(packing: Packing) -> str:
    return TRUNCATED_TO_NO_TARGET if packing.long_documents == "truncate" else PIECE_WITHOUT_TARGET


def _add(counts: dict[str, int], reason: str, count: int) -> None:
    if count:
        counts[reason] = counts.get(reason, 0) + count


def _shares(
    sources: Sequence[Source], source_N: NDArray[np.integer], targets_N: Int64, copies_N: Int64
) -> tuple[SourceShare, ...]:
    once_S = np.bincount(source_N, targets_N, len(sources)).astype(np.int64).tolist()
    mixed_S = np.bincount(source_N, targets_N * copies_N, len(sources)).astype(np.int64).tolist()
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
