"""The power fails: what is on the disk after any system call is a whole checkpoint, or none of that name.

A trace of a real run is replayed on a model of a disk: bytes of a file are there when it was fsynced, and names in a
folder, new or gone, at the worst moment: late (when the folder was fsynced), early (at once), or gone early and new
late. File systems promise less order than one may hope (Pillai et al., "All File Systems Are Not Created Equal").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.faults.saves import saves
from tests.faults.tracing import traced
from trainkit.training.checkpoint import FILES, MANIFEST, STEP_FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.faults.conftest import Tally
    from tests.faults.forks import Forks, Story

CALLS = (
    "openat,mkdir,write,pwrite64,copy_file_range,sendfile,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,"
    "unlinkat,rmdir"
)
WHOLE = {*FILES, MANIFEST}
VIEWS = ("late", "early", "gone early, new late")


@dataclass
class Node:
    """A file with its bytes, or a folder with its names; ``durable`` is what an fsync has brought to disk.

    ``last_size`` is what a file will have in the end, where that is known.
    """

    size: int = 0
    durable_size: int = 0
    last_size: int = 0
    names: dict[str, Node] = field(default_factory=dict)
    durable_names: dict[str, Node] = field(default_factory=dict)

    def seen(self, view: str) -> dict[str, Node]:
        """The names that are there after the power was cut."""
        if view == "early":
            return self.names
        if view == "late":
            return self.durable_names
        return {name: node for name, node in self.durable_names.items() if self.names.get(name) is node}

    def is_on_disk(self) -> bool:
        """Whether a cut now would lose nothing of it."""
        return (
            self.size == self.durable_size
            and self.names == self.durable_names
            and all(node.is_on_disk() for node in self.names.values())
        )


@dataclass(frozen=True)
class Operation:
    """A system call that succeeded: its name, the path or the two paths, and how many bytes."""

    call: str
    path: str
    to: str = ""
    size: int = 0


class Disk:
    """Everything under one folder that exists from the beginning."""

    def __init__(self, root: str, last_sizes: Sequence[int] = ()) -> None:
        self.root_path = root
        self.root = Node()
        self.made: list[Node] = []
        self._last_sizes = last_sizes

    def node(self, path: str) -> Node | None:
        """What has the path now; None outside of the folder, too."""
        if path == self.root_path:
            return self.root
        if not path.startswith(self.root_path + "/"):
            return None
        found: Node | None = self.root
        for name in path.removeprefix(self.root_path + "/").split("/"):
            found = found.names.get(name) if found else None
        return found

    def parent(self, path: str) -> tuple[Node | None, str]:
        folder, _, name = path.rpartition("/")
        return self.node(folder), name

    def apply(self, operation: Operation) -> None:
        """Do what the system call did."""
        folder, name = self.parent(operation.path)
        node = self.node(operation.path)
        if operation.call in {"open", "mkdir"} and folder is not None and name not in folder.names:
            made = folder.names[name] = Node(last_size=dict(enumerate(self._last_sizes)).get(len(self.made), 0))
            self.made.append(made)
        elif operation.call == "write" and node is not None:
            node.size += operation.size
        elif operation.call == "truncate" and node is not None:
            node.size = operation.size
        elif operation.call == "fsync" and node is not None:
            node.durable_size, node.durable_names = node.size, dict(node.names)
        elif operation.call == "remove" and folder is not None:
            folder.names.pop(name, None)
        elif operation.call == "rename" and folder is not None and node is not None:
            target, new_name = self.parent(operation.to)
            del folder.names[name]
            if target is not None:
                target.names[new_name] = node


def operations(log: str) -> list[Operation]:
    """The calls of a log of `strace -f -y -s 0` that succeeded, in the order in which they ended."""
    found, unfinished = [], {}
    for line in log.splitlines():
        process, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            unfinished[process] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            text = unfinished.pop(process) + resumed[1]
        call = re.match(r"(\w+)\((.*)\)\s+= (\d+)", text)
        if call is not None and (operation := _operation(call[1], call[2], int(call[3]))):
            found.append(operation)
    return found


def _operation(call: str, arguments: str, result: int) -> Operation | None:
    paths = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    descriptor = re.match(r"\d+<([^>]*)>", arguments)
    if call == "openat":
        return Operation("open", paths[0]) if "O_CREAT" in arguments else None
    if call == "mkdir":
        return Operation("mkdir", paths[0])
    if call.startswith("rename"):
        return Operation("rename", paths[0], to=paths[1])
    if call in {"unlink", "rmdir"}:
        return Operation("remove", paths[0])
    if call == "unlinkat":
        return Operation("remove", f"{descriptor[1]}/{paths[0]}" if descriptor else paths[0])
    if call in {"copy_file_range", "sendfile"}:
        files = re.findall(r"\d+<([^>]*)>", arguments)
        return Operation("write", files[0] if call == "sendfile" else files[1], size=result)
    assert descriptor is not None, (call, arguments)
    if call in {"write", "pwrite64"}:
        return Operation("write", descriptor[1], size=result)
    if call == "ftruncate":
        return Operation("truncate", descriptor[1], size=int(arguments.rpartition(",")[2]))
    return Operation("fsync", descriptor[1])


def whole_ones(disk: Disk, view: str) -> set[str]:
    """The names under which a checkpoint lies with all its files, to their last byte."""
    return {
        name
        for name, node in disk.root.seen(view).items()
        if STEP_FOLDER.fullmatch(name)
        and node.seen(view).keys() >= WHOLE
        and all(node.seen(view)[file].durable_size == node.seen(view)[file].last_size for file in WHOLE)
    }


def replayed(root: str, calls: Sequence[Operation]) -> Iterator[tuple[Operation, Disk]]:
    """The disk after each call; every file knows how long it will be in the end."""
    rehearsal = Disk(root)
    for operation in calls:
        rehearsal.apply(operation)
    disk = Disk(root, [node.size for node in rehearsal.made])
    for operation in calls:
        disk.apply(operation)
        yield operation, disk


def problems_of_cuts(root: str, calls: Sequence[Operation]) -> tuple[int, list[str]]:
    """How many cuts were tried, and what was wrong after them."""
    problems, published = [], False
    for number, (operation, disk) in enumerate(replayed(root, calls), 1):
        published |= operation == Operation("fsync", root) and bool(whole_ones(disk, "late"))
        for view in VIEWS:
            names = disk.root.seen(view)
            claimed = {name for name in names if STEP_FOLDER.fullmatch(name) and MANIFEST in names[name].seen(view)}
            whole = whole_ones(disk, view)
            if half := claimed - whole:
                problems.append(f"cut after call {number} ({operation}), names {view}: half {sorted(half)}")
            if published and not whole:
                problems.append(f"cut after call {number} ({operation}), names {view}: no checkpoint is left")
    return len(calls) * len(VIEWS), problems


@pytest.fixture
def calls(forks: Forks, tmp_path: Path) -> tuple[str, list[Operation]]:
    """The calls of four saves of which one is kept, and the folder that they went into."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    waiting = forks.call(saves, str(root), 1, 4, 1, 1000, wait_for_tracer=True)
    ended, log = traced(forks, waiting, tmp_path, ["-y", "-s", "0", "-e", f"trace={CALLS}"])
    assert ended.code == 0
    assert [path.name for path in root.iterdir()] == ["step-000004"]
    return str(root), operations(log)


@pytest.mark.goal("A5 the power is cut after a system call of four saves, three views of the disk")
def test_after_a_cut_at_any_call_there_are_whole_checkpoints_or_none(
    calls: tuple[str, list[Operation]], tally: Tally
) -> None:
    root, done = calls
    tried, problems = problems_of_cuts(root, done)
    assert sum(operation.call == "fsync" for operation in done) >= 4 * 8
    tally.tried = tried - 1
    tally.count("all cuts", problems)
    tally.note(at_least=100)


def test_the_model_notices_every_file_that_is_not_brought_to_disk(calls: tuple[str, list[Operation]]) -> None:
    """Whatever is fsynced is fsynced for a reason: without it, a cut at some call leaves less than it should."""
    root, done = calls
    second = next(path for path in dict.fromkeys(operation.path for operation in done) if ".step-000002." in path)
    fsynced = {operation.path for operation in done if operation.call == "fsync" and operation.path.startswith(second)}
    assert len(fsynced) == len(WHOLE) + 1
    for path in (root, *sorted(fsynced)):
        without = [operation for operation in done if operation != Operation("fsync", path)]
        assert len(without) < len(done)
        if path == root:  # the first is how it is known that a checkpoint was published
            first = done.index(Operation("fsync", root))
            without = [o for index, o in enumerate(done) if index <= first or o != Operation("fsync", path)]
        assert problems_of_cuts(root, without)[1], path


@pytest.mark.goal("A5 what a run gives a name is on disk before: packed data, checkpoints, result, records")
def test_nothing_in_a_run_gets_its_name_before_it_is_on_disk(story: Story, tmp_path: Path, tally: Tally) -> None:
    place = tmp_path / "place"
    place.mkdir()
    folder, cache = place / "run", place / "cache"
    waiting = story.forks.run(story.command(folder), cache=cache, wait_for_tracer=True)
    ended, log = traced(story.forks, waiting, tmp_path, ["-y", "-s", "0", "-e", f"trace={CALLS}"])
    assert ended.code == 0, ended.said
    renamed: dict[str, int] = {}
    last_fsync: dict[str, int] = {}
    done = operations(log)
    disk = Disk(str(place))
    for number, operation in enumerate(done):
        node = disk.node(operation.path)
        hidden = "/." in operation.to or operation.to.endswith("/retired.json")
        if operation.call == "rename" and node is not None and not hidden:
            renamed[operation.to] = number
            tally.count(operation.to, [] if node.is_on_disk() else ["is not on disk when it gets its name"])
        elif operation.call == "fsync":
            last_fsync[operation.path] = number
        disk.apply(operation)
    late = [path for path, number in renamed.items() if last_fsync.get(path.rpartition("/")[0], -1) < number]
    tally.count("all names", [f"{path}: its folder was not fsynced afterwards" for path in late])
    assert {"final", "summary.json", "run.json", "step-000012"} <= {path.rpartition("/")[2] for path in renamed}
    tally.note(at_least=15)
