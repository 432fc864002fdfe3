"""Where a run would lie, and what this machine does not have or cannot do."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.bad_input.room import Case, Room


def output_is_a_file(room: Room) -> None:
    (room.folder / "run").write_text("precious")


def output_below_a_file(room: Room) -> None:
    (room.folder / "taken").write_text("precious")
    room.set("output_dir", "taken/run")


def output_is_others(room: Room) -> None:
    (room.folder / "run").mkdir()
    (room.folder / "run" / "thesis.tex").write_text("precious")


def cache_below_a_file(room: Room) -> None:
    (room.folder / "taken").write_text("precious")
    room.monkeypatch.setenv("TRAINKIT_CACHE", "taken/cache")


def without_bitsandbytes(room: Room, key: str, value: str) -> None:
    room.without_package("bitsandbytes")
    room.set(key, value)


def without_tracker(room: Room) -> None:
    room.without_package("wandb")
    room.set("tracking", ["wandb"])


MACHINE_CASES = [
    Case("output_dir is not ours", output_is_others, 2, r"output_dir: run is not empty and no run of trainkit's"),
    Case("output_dir is a file", output_is_a_file, 5, r"output_dir: run is a file; name a new folder"),
    Case("output_dir below a file", output_below_a_file, 5, r"output_dir: taken/run cannot be made: taken is a file"),
    Case("cache below a file", cache_below_a_file, 5, r"cannot write packed data in .*TRAINKIT_CACHE"),
    Case(
        "qlora without bitsandbytes",
        lambda room: without_bitsandbytes(room, "adapter.type", "qlora"),
        5,
        r"adapter\.type: qlora: needs bitsandbytes, .*pip install 'trainkit\[qlora\]'",
    ),
    Case(
        "adamw_8bit without bitsandbytes",
        lambda room: without_bitsandbytes(room, "training.optimizer", "adamw_8bit"),
        5,
        r"training\.optimizer: adamw_8bit: needs bitsandbytes, .*pip install 'trainkit\[qlora\]'",
    ),
    Case(
        "tracker not installed",
        without_tracker,
        5,
        r"tracking: wandb is not installed; pip install 'train",
    ),
]

NEEDS_CUDA = [
    Case("flex", lambda room: room.set("model.attention", "flex"), 5, r"model\.attention: flex .*use sdpa or auto"),
    Case("varlen", lambda room: room.set("model.attention", "varlen"), 5, r"model\.attention: .*use sdpa or auto"),
    Case(
        "flash_attention_2",
        lambda room: room.set("model.attention", "flash_attention_2"),
        5,
        r"model\.attention: flash_attention_2 needs CUDA; use sdpa or auto",
    ),
]


def output(path: str) -> Callable[[Room], object]:
    return lambda room: room.set("output_dir", path)


def output_is_a_link_to_itself(room: Room) -> None:
    (room.folder / "run").symlink_to("run")


def output_is_a_link_to_a_file(room: Room) -> None:
    (room.folder / "run").symlink_to("train.jsonl")


def checkpoint_of_another(room: Room) -> None:
    (room.folder / "run" / "checkpoint-3").mkdir(parents=True)
    (room.folder / "run" / "checkpoint-3" / "precious.txt").write_text("precious")


def cache(path: str) -> Callable[[Room], object]:
    return lambda room: room.monkeypatch.setenv("TRAINKIT_CACHE", path)


def without_home(room: Room) -> None:
    room.monkeypatch.delenv("TRAINKIT_CACHE")
    for name in ("XDG_CACHE_HOME", "HOME"):
        room.monkeypatch.delenv(name, raising=False)
    room.monkeypatch.setattr("os.path.expanduser", lambda path: path)


MORE_MACHINE_CASES = [
    Case(
        "output_dir is where the command runs",
        output("."),
        2,
        r"^output_dir: \. is not empty and no run of trainkit's; name a new folder$",
    ),
    Case(
        "output_dir is the model",
        output("model"),
        2,
        r"^output_dir: model is not empty and no run of trainkit's; name a new folder$",
    ),
    Case(
        "output_dir is the model by another way",
        output("model/../model"),
        2,
        r"^output_dir: model/\.\./model is not empty and no run of trainkit's; name a new folder$",
    ),
    Case(
        "output_dir holds another's checkpoints",
        checkpoint_of_another,
        2,
        r"^output_dir: run is not empty and no run of trainkit's; name a new folder$",
    ),
    Case("output_dir is a device", output("/dev/null"), 5, r"^output_dir: /dev/null is a file; name a new folder$"),
    Case(
        "output_dir below a device",
        output("/dev/null/run"),
        5,
        r"^output_dir: /dev/null/run cannot be made: /dev/null is a file; name a new folder$",
    ),
    Case(
        "output_dir in a file system of the kernel's",
        output("/proc/run"),
        5,
        r"^output_dir: /proc/run cannot be written: No such file or directory \(tried in /proc\); name a new folder$",
    ),
    Case(
        "output_dir is a link to itself",
        output_is_a_link_to_itself,
        5,
        r"^output_dir: run cannot be used: it is a link to itself; name a new folder$",
    ),
    Case(
        "output_dir is a link to a file",
        output_is_a_link_to_a_file,
        5,
        r"^output_dir: run is a file; name a new folder$",
    ),
    Case(
        "output_dir in nobody's home",
        output("~nobody-here/run"),
        5,
        r"^output_dir: ~nobody-here/run cannot be used: there is no such home folder; name a new folder$",
    ),
    Case(
        "cache is a device",
        cache("/dev/null"),
        5,
        r"^cannot write packed data in /dev/null: File exists;.*pack-data's --output\)$",
    ),
    Case(
        "cache in a file system of the kernel's",
        cache("/proc/cache"),
        5,
        r"^cannot write packed data in /proc/cache: No such.*pack-data's --output\)$",
    ),
    Case(
        "no home for a cache",
        without_home,
        5,
        r"^there is no home folder; set the environment variable TRAINKIT_CACHE to a folder$",
    ),
    Case(
        "a picture of an unknown kind",
        lambda room: None,
        2,
        r"^--plot: a\.pdf must end in \.png, \.svg or \.html$",
        command=("estimate-memory", "recipe.yaml", "--plot", "a.pdf"),
    ),
    Case(
        "a picture in no folder",
        lambda room: None,
        2,
        r"^--plot: no is no folder; create it first$",
        command=("estimate-memory", "recipe.yaml", "--plot", "no/a.png"),
    ),
    Case(
        "a model that does not fit",
        lambda room: None,
        5,
        r"^llama-3\.3-70b: not even one row of 2,048 tokens fits in 1\.00 GiB \(as given\)$",
        command=("estimate-memory", "--model", "llama-70b", "--memory", "1GiB"),
    ),
]
