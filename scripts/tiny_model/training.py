"""The tiny model itself: its shape, and its training from random weights on an endless stream of generated documents.

Shapes: R rows of a batch, T tokens of a row, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tiny_model.chats import random_chat
from tiny_model.muon import muon
from tiny_model.stories import random_story
from tiny_model.tokenizer import END_OF_TEXT, END_OF_TURN, POSITIONS, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from tiny_model.chats import Messages

CHAT_SHARE = 0.7  # of the documents; stories are longer, so that it is about half of the tokens
HELD_OUT_SEED = "held out"  # a stream that no training seed gives


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the weights, the machine aside."""

    seed: int = 1
    tokenizer_documents: int = 20_000
    steps: int = 1_200
    step_tokens: int = 2_048
    row_tokens: int = 128  # a story or a conversation is rarely longer, and short rows are cheap ...
    long_row_tokens: int = POSITIONS  # ... so that the far positions are learned in the last steps only
    long_row_share: float = 0.15
    warmup_steps: int = 50
    learning_rate: float = 5e-3
    final_learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    threads: int = 1


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights: 0.9 million parameters, grouped-query attention, tied embeddings."""
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.05,  # the usual 0.02 suits wide models; at width 128 attention would start out blind
            dtype="float32",
            **ids,
        )
    )
    model.generation_config = GenerationConfig(**(ids | {"eos_token_id": [tokenizer.eos_token_id, end_of_text]}))
    return model


Document = list[tuple[int, bool]]  # every token, and whether it is a target


def conversation_pieces(messages: Messages) -> Iterator[tuple[str, bool]]:
    """The conversation as the chat template renders it, in pieces: trained are the answers and what ends them."""
    for message in messages:
        answered = message["role"] == "assistant"
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + END_OF_TURN, answered
        yield "\n", answered


def documents(rng: Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """An endless stream of stories, trained in every token, and conversations, trained in what the assistant says."""
    while True:
        pieces = (
            list(conversation_pieces(random_chat(rng))) if rng.random() < CHAT_SHARE else [(random_story(rng), True)]
        )
        yield [
            (token, trained)
            for text, trained in [*pieces, (END_OF_TEXT, True)]
            for token in tokenizer.encode(text, add_special_tokens=False)
        ]


def tokenizer_texts(seed: int, count: int) -> Iterator[str]:
    """What the tokenizer's merges are counted on: so many stories, and what is said in so many conversations."""
    rng = Random(f"tokenizer {seed}")
    for _ in range(count):
        yield random_story(rng)
        yield from (message["content"] for message in random_chat(rng))


def rows_of(stream: Iterator[Document], rows: int, row_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (R, T): a row is whole documents one after the other, the last one cut off where the row ends.

    ``labels[r, t]`` is the token after ``ids[r, t]``, or -100 where that one is not a target.
    """
    ids, labels = [], []
    for _ in range(rows):
        row: Document = []
        while len(row) <= row_tokens:
            row += next(stream)
        ids.append([token for token, _ in row[:row_tokens]])
        labels.append([token if trained else -100 for token, trained in row[1 : row_tokens + 1]])
    return torch.tensor(ids), torch.tensor(labels)


def loss(model: LlamaForCausalLM, ids_RT: Tensor, labels_RT: Tensor) -> Tensor:
    """Mean cross-entropy of the targets, in nats per token."""
    logits_RTV: Tensor = model(input_ids=ids_RT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1), labels_RT.flatten())


def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The loss on 32 rows of 256 tokens, always the same, of documents that no training seed generates."""
    with torch.no_grad():
        return loss(model, *rows_of(documents(Random(HELD_OUT_SEED), tokenizer), rows=32, row_tokens=256)).item()


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to the final rate; steps count from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    height = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + height * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and what there is to say about its training."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    training_loss: float
    held_out_loss: float
    tokens: int
    seconds: float


def train(settings: Settings, on_progress: Callable[[int, float, float], None]) -> Trained:
    """Trains tokenizer and model; the same settings give the same bits on the same machine.

    ``on_progress`` gets the step, counted from 1, its loss and the seconds so far.
    """
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(tokenizer_texts(settings.seed, settings.tokenizer_documents))
    model = new_model(tokenizer, settings.seed)
    hidden = muon(parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2)
    others = [parameter for name, parameter in model.named_parameters() if "_proj" not in name]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    stream = documents(Random(f"training {settings.seed}"), tokenizer)
    started, last_losses = time.monotonic(), [math.nan] * 50
    for step in range(settings.steps):
        row_tokens = (
            settings.row_tokens if step < settings.steps * (1 - settings.long_row_share) else settings.long_row_tokens
        )
        ids, labels = rows_of(stream, settings.step_tokens // row_tokens, row_tokens)
        step_loss = loss(model, ids, labels)
        torch.autograd.backward(step_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        rate = adamw.param_groups[0]["lr"] = learning_rate(step, settings)
        hidden.step(rate)
        adamw.step()
        adamw.zero_grad()
        last_losses = [*last_losses[1:], step_loss.item()]
        on_progress(step + 1, step_loss.item(), time.monotonic() - started)
    seconds = time.monotonic() - started
    model.eval()
    return Trained(
        model,
        tokenizer,
        training_loss=sum(last_losses) / len(last_losses),
        held_out_loss=held_out_loss(model, tokenizer),
        tokens=settings.steps * settings.step_tokens,
        seconds=seconds,
    )
