"""What the quickstart teaches: to answer a told event with a card.

A card is one line, ``Who: Tom | What: red kite | Where: garden | When: Monday``. The model knows the sentences and what
"who" or "where" asks for, but it has never seen a card: before the fine-tune it makes a remark about the story.
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import TYPE_CHECKING

from tiny_model.chats import Messages, as_messages
from tiny_model.events import Event, random_event, told

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 7
TRAIN_EXAMPLES = 1_500
EVAL_EXAMPLES = 200


def card(event: Event) -> str:
    """The four facts of an event on one line."""
    return f"Who: {event.who.name} | What: {event.what} | Where: {event.place.noun} | When: {event.day}"


def is_held_out(event: Event) -> bool:
    """Whether events of this person with this thing belong to the eval file: one pair of ten, by a stable hash.

    The person and the thing decide, not the whole sentence: no question of the eval file differs from one of the
    training file in the day or the place only.
    """
    pair = f"{event.who.name} {event.thing}"
    return hashlib.sha256(pair.encode()).digest()[0] % 10 == 0


def examples(count: int, *, held_out: bool, seed: int = SEED) -> Iterator[Messages]:
    """So many examples in messages format, no two with the same question, from one side of the split."""
    rng = Random(f"cards {seed} {held_out}")
    seen: set[str] = set()
    while len(seen) < count:
        event = random_event(rng)
        if is_held_out(event) != held_out:
            continue
        question = told(event, rng)
        if question not in seen:
            seen.add(question)
            yield as_messages([(question, card(event))])
