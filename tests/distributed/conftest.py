"""A start of two processes costs seconds, so that tests share the runs of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.distributed.workbench import Workbench, write_conversations

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def bench(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """20 steps of 5 rows, the last of each epoch with one row: fewer than there are processes."""
    root = tmp_path_factory.mktemp("distributed")
    return Workbench(
        root,
        {
            "model": {"name": str(tiny_model_folder)},
            "precision": "fp32",
            "adapter": {"type": "lora", "r": 4, "alpha": 8},
            "data": {
                "train": str(write_conversations(root / "train.jsonl", 57, seed=7)),
                "eval": [{"path": str(write_conversations(root / "held-out.jsonl", 12, seed=8))}],
            },
            "packing": {"sequence_length": 128, "overlap": 8},
            "training": {
                "steps": 20,
                "tokens_per_step": 640,
                "micro_batch_size": 1,
                "learning_rate": 3e-3,
                "weight_decay": 0.01,
                "max_grad_norm": 0.15,
            },
            "evaluation": {"every_steps": 7, "samples": 1, "exact_match": 3, "max_new_tokens": 4},
            "checkpoints": {"every_steps": 4, "keep_last": 9},
        },
    )
