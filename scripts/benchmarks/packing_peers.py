"""Other projects' packers, run from their own published files: lengths of pieces in, a number of rows out.

Each is installed into a folder of its own, ``pip install --no-deps --target DIR/<folder> <requirements>``, so that none
of them needs what the others need and nothing enters the project's environment. Most of their packages import half of
their project's dependencies on the way to one file; so the packages above that file are not initialised, and modules
that the packer does not use are stood in for. The packer itself is the file as published.

Legend: P pieces.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import queue
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Lengths = NDArray[np.int64]

Packer = Callable[[], int]
"""Packs once; returns the number of rows."""
WINDOW = 1000
"""Documents that datasets.map hands over at once unless told otherwise; LLaMA-Factory's and ms-swift's default too."""
AXOLOTL_BIN_SIZE = 200
"""axolotl's default for the most documents in a row."""


@dataclass(frozen=True)
class Peer:
    """One packer of another project. ``ready(folder, lengths_P, capacity)`` loads it and returns what is timed."""

    name: str
    folder: str
    requirements: tuple[str, ...]
    manner: str
    ready: Callable[[Path, Lengths, int], Packer]
    most_pieces: int = 10**9
    """Beyond so many it is not tried: it would take many minutes, or more memory than most machines have."""
    why_no_more: str = ""

    def version(self, peers: Path) -> str | None:
        """The installed version, None where it is not installed under ``peers``."""
        name = self.requirements[0].partition("==")[0]
        found = importlib.metadata.distributions(name=name, path=[str(peers / self.folder)])
        return next((one.version for one in found), None)


def load(folder: Path, module: str, *, bare: Sequence[str] = (), stood_in: Sequence[str] = ()) -> Any:
    """Import ``module`` from the packages in ``folder`` without initialising the packages above it.

    ``bare`` names more packages that stay uninitialised, ``stood_in`` modules that are not imported at all.
    """
    sys.path.insert(0, str(folder))
    names = module.split(".")
    parents = [".".join(names[:depth]) for depth in range(1, len(names))]
    for name in (*parents, *bare):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    for name in stood_in:
        sys.modules[name] = MagicMock()
    return importlib.import_module(module)


def _trl(strategy: str) -> Callable[[Path, Lengths, int], Packer]:
    def ready(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
        import pyarrow as pa

        sys.path.insert(0, str(folder))
        import datasets
        import numpy as np
        from trl.data_utils import pack_dataset

        datasets.disable_progress_bars()
        offsets = np.concatenate(([0], np.cumsum(lengths_P)))
        # Tokens without a content: the lightest column that TRL takes, so that next to no time goes into moving them.
        column = pa.LargeListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))
        dataset = datasets.Dataset(pa.table({"input_ids": column}))
        return lambda: len(pack_dataset(dataset, capacity, strategy, {"load_from_cache_file": False}))

    return ready


def _llama_factory(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    module = load(folder, "llamafactory.data.processor.processor_utils")
    lengths = lengths_P.tolist()
    windows = range(0, len(lengths), WINDOW)
    return lambda: sum(len(module.greedy_knapsack(lengths[at : at + WINDOW], capacity)) for at in windows)


def _axolotl(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    module = load(folder, "axolotl.utils.samplers.multipack")
    from torch.utils.data import RandomSampler

    def pack() -> int:
        sampler = RandomSampler(range(lengths_P.size))
        batches = module.MultipackBatchSampler(sampler, 1, capacity, lengths_P, bin_size=AXOLOTL_BIN_SIZE)
        return len(batches.generate_batches())

    module.pack_group(lengths_P[:10].astype("int32"), 0, capacity, 10, 10, safe_mode=True)  # compiled once, not timed
    return pack


def _ms_swift(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    module = load(folder, "swift.dataset.packing", stood_in=("swift.template", "swift.utils"))
    lengths = lengths_P.tolist()

    def pack() -> int:
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        module.PackingDataset.create_packed_idx(0, 0, lengths, found, capacity, "binpack")
        return sum(len(found.get()[1]) for _ in range(found.qsize()))

    return pack


def _olmo_core(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    import numpy as np

    module = load(folder, "olmo_core.data.utils", stood_in=("olmo_core.io", "olmo_core.utils", "olmo_core.data.types"))
    ends = np.cumsum(lengths_P)
    begin_and_end = np.stack([ends - lengths_P, ends], axis=1).astype(np.uint64)
    return lambda: len(module.InstancePacker(capacity).pack_documents(begin_and_end)[0])


def _torchtune(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    module = load(folder, "torchtune.datasets._packed", bare=("torchtune.data",))
    module.tqdm = MagicMock()
    documents = [{"tokens": [0] * length, "labels": [0] * length} for length in lengths_P.tolist()]
    return lambda: len(module.PackedDataset(documents, max_seq_len=capacity).packs)


def _megatron_bridge(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    import numpy as np

    module = load(folder, "megatron.bridge.data.datasets.packing_utils")
    histogram = np.bincount(lengths_P, minlength=capacity + 1).tolist()
    return lambda: len(module.create_packing_strategy(histogram, capacity, "first_fit_shuffle")[0])


def _light_bin_pack(folder: Path, lengths_P: Lengths, capacity: int) -> Packer:
    sys.path.insert(0, str(folder))
    module = importlib.import_module("lightbinpack")
    lengths = lengths_P.tolist()
    return lambda: len(module.obfd(lengths, capacity))


TRL = Peer("TRL, bfd (its default)", "trl", ("trl==1.16.0",), "windows of 1,000", _trl("bfd"))
PEERS = (
    TRL,
    Peer("TRL, wrapped", "trl", TRL.requirements, "windows of 1,000; cuts documents anywhere", _trl("wrapped")),
    Peer("LLaMA-Factory", "llamafactory", ("llamafactory==0.9.5",), "windows of 1,000", _llama_factory),
    Peer("ms-swift", "ms-swift", ("ms-swift==4.6.0", "binpacking"), "windows of 1,000, carried over", _ms_swift),
    Peer("axolotl", "axolotl", ("axolotl==0.19.0", "numba", "llvmlite"), "windows of 100,000, first fit", _axolotl),
    Peer("OLMo-core", "olmo-core", ("ai2-olmo-core==3.0.0",), "best fit, all at once", _olmo_core),
    Peer(
        "torchtune",
        "torchtune",
        ("torchtune==0.6.1",),
        "next fit; fills and pads the rows as it goes",
        _torchtune,
        100_000,
        "it holds all rows in memory, 24 bytes a slot",
    ),
    Peer(
        "Megatron-Bridge",
        "megatron-bridge",
        ("megatron-bridge==0.3.1",),
        "first fit, shuffled; NeMo's code is the same",
        _megatron_bridge,
        100_000,
        "its time grows with documents x rows",
    ),
    Peer("LightBinPack (C++)", "lightbinpack", ("lightbinpack==0.1.1",), "best fit, all at once", _light_bin_pack),
)


def installing_lines(peers: str = "DIR") -> str:
    """The commands that install every peer under ``peers``."""
    needed = {peer.folder: peer.requirements for peer in PEERS}
    return "\n".join(
        f"  pip install --no-deps --target {peers}/{folder} {' '.join(requirements)}"
        for folder, requirements in needed.items()
    )
