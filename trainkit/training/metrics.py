"""What a run records while it trains: lines of JSON in its folder, and the trackers that the recipe names.

The run folder's files are the record; a tracker is a copy for looking at. Neither may end a run that trains well: a
full disk or an unreachable server is said once, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from trainkit.errors import CheckpointError, MachineError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from trainkit.run_folder import RunFolder

# The key of a line that holds what JSON has no number for: {"not_finite": {"loss": "nan"}}.
NOT_FINITE = "not_finite"
FINISH_SECONDS = 60.0  # that a tracker has to send the rest at the end
MOST_WAITING = 10_000  # steps and evaluations whose numbers wait for a tracker that does not take them


class NoLog:
    """Stands for a :class:`MetricsLog` in a process that records nothing."""

    length_bytes = 0

    def append(self, _record: Mapping[str, Any]) -> bool:
        """Record nothing, which succeeds."""
        return True

    def truncate_to(self, _length_bytes: int) -> None:
        """Forget nothing."""

    def sync(self) -> None:
        """There is nothing to be kept."""


class MetricsLog:
    """A file of one JSON object a line, for metrics.jsonl and samples.jsonl.

    Every line is handed to the system whole, and at a known place: after a failed write the next line takes the place
    of whatever part of the failed one was written. ``length_bytes`` is where the next line will stand; a checkpoint
    keeps it, and a resumed run goes back to it with :meth:`truncate_to`, so that no step is recorded twice.
    A context manager. Opening it creates the file; raises MachineError when that cannot be done.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """Open ``path`` behind its last complete line; ``on_failure`` gets one line the first time a write fails."""
        self._path = path
        self._on_failure = on_failure
        self._failed = False
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            self.length_bytes = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._descriptor, self.length_bytes)
        except OSError as error:
            raise MachineError(f"{path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> bool:
        """Write ``record`` as the next line; whether that succeeded.

        A number that is not finite is written as null, and named with its kind under ``not_finite``.
        """
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        data = line.encode("utf-8", "backslashreplace")
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self.length_bytes + written)
        except OSError as error:
            self._report(f"{self._path}: {error.strerror}; training goes on, this record has gaps")
            return False
        self.length_bytes += len(data)
        return True

    def truncate_to(self, length_bytes: int) -> None:
        """Forget every line behind the first ``length_bytes`` bytes.

        A file that is empty or gone begins anew, and one that is shorter goes on behind what it has: lines that a full
        disk swallowed must not keep a run from continuing. Raises CheckpointError when the file is longer and no line
        ends there: it is then another run's, or was edited.
        """
        if length_bytes > self.length_bytes:
            state = "has lost its last lines" if self.length_bytes else "is empty"
            self._report(f"{self._path}: {state}; steps before this one are not recorded")
            return
        if length_bytes and os.pread(self._descriptor, 1, length_bytes - 1) != b"\n":
            raise CheckpointError(
                f"{self._path}: has {self.length_bytes:,} bytes and no line ending at byte {length_bytes:,}, where the "
                "checkpoint left it; move the file away to continue without its past"
            )
        os.ftruncate(self._descriptor, length_bytes)
        self.length_bytes = length_bytes

    def sync(self) -> None:
        """Make the lines survive a power cut; called before a checkpoint that counts on them is committed."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._report(f"{self._path}: {error.strerror}; training goes on, this record may have gaps")

    def close(self) -> None:
        """Cut off what a failed write may have left, and let go of the file."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.ftruncate(descriptor, self.length_bytes)
                os.close(descriptor)
            except OSError as error:  # a file system may keep what a write failed of until now
                self._report(f"{self._path}: {error.strerror}; this record may have gaps")

    def _report(self, line: str) -> None:
        if not self._failed:
            self._failed = True
            self._on_failure(line)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` with its not finite numbers named instead of held.

    >>> _finite({"step": 3, "loss": float("nan"), "grad_norm": float("inf")})
    {'step': 3, 'loss': None, 'grad_norm': None, 'not_finite': {'loss': 'nan', 'grad_norm': 'inf'}}
    """
    odd = {name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**record, **dict.fromkeys(odd), NOT_FINITE: odd} if odd else dict(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in order; a last line without its end is left out.

    Raises CheckpointError, naming the line, when another line is no JSON object.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}:{number}: is no JSON object; delete the line")
        records.append(record)
    return records


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl; raises CheckpointError as `read_metrics` does, and for a line that is no answer."""
    samples = read_metrics(path)
    for number, sample in enumerate(samples, 1):
        texts = (sample.get(name) for name in ("place", "prompt", "reference", "answer"))
        if not {"step", "match"} <= sample.keys() or not all(isinstance(text, str) for text in texts):
            raise CheckpointError(f"{path}:{number}: is no answer to a prompt; delete the line")
    return samples


@dataclass(frozen=True)
class Tracker:
    """One place that numbers are sent to: how to send, and how to end."""

    name: str
    log: Callable[[int, Mapping[str, float]], None]
    finish: Callable[[], None]


class TrackerThread:
    """A tracker in a thread of its own, in which all of it happens: a server that does not answer stops no step.

    What goes wrong there is kept in ``failure`` as a sentence, for the training thread to say; nothing is sent after
    it. Making one waits until the tracker has started, and raises what ``start`` raises.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name = name
        self.failure: str | None = None
        self._work: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._started: queue.Queue[Exception | None] = queue.Queue()
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(start,), name=f"tracker {name}", daemon=True).start()
        refusal = self._started.get()
        if refusal is not None:
            raise refusal

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand over the numbers of a step; waits for nothing."""
        try:
            self._work.put_nowait((step, numbers))
        except queue.Full:
            self.failure = f"takes no numbers any more (step {step}) and is left out"

    def end(self, seconds: float) -> None:
        """Let it send what it still has and finish, for at most ``seconds``."""
        deadline = time.monotonic() + seconds
        with suppress(queue.Full):
            self._work.put(None, timeout=seconds)
        if not self._ended.wait(max(0.0, deadline - time.monotonic())):
            self.failure = f"did not finish in {seconds:g} seconds and is left behind"

    def _run(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
        except Exception as error:  # whatever its library raises when it finds no login, server or room
            self._started.put(error)
            return
        self._started.put(None)
        while (work := self._work.get()) is not None:
            step, numbers = work
            if self.failure is not None:
                continue
            try:
                tracker.log(step, numbers)
            except Exception as error:  # whatever a tracker's own library may raise: training must not end for it
                self.failure = f"failed at step {step} and is left out: {first_line(error)}"
        if self.failure is None:
            try:
                tracker.finish()
            except Exception as error:  # as above: the run is complete without it
                self.failure = f"failed at the end: {first_line(error)}"
        self._ended.set()


class Trackers:
    """The trackers of a run. One that fails or hangs is said once and left out from then on."""

    def __init__(self, trackers: Iterable[TrackerThread], on_failure: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._on_failure = on_failure

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among ``values`` (``step`` itself and whatever is no number are left out)."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in list(self._trackers):
            tracker.send(step, numbers)
            self._leave_out_if_failed(tracker)

    def finish(self) -> None:
        """Let every tracker send what it still holds; one that takes longer than a minute is left behind."""
        for tracker in list(self._trackers):
            tracker.end(FINISH_SECONDS)
            self._leave_out_if_failed(tracker)
        self._trackers.clear()

    def _leave_out_if_failed(self, tracker: TrackerThread) -> None:
        if tracker.failure is not None:
            self._trackers.remove(tracker)
            self._on_failure(f"tracking: {tracker.name} {tracker.failure}")


def check_trackers(names: Sequence[str]) -> None:
    """Raise MachineError, with the command that mends it, when a tracker's package is not installed. Loads nothing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name
            raise MachineError(
                f"tracking: {name} is not installed; pip install 'trainkit[{name}]', or take it out of `tracking`"
            )


def open_trackers(
    names: Sequence[str],
    folder: RunFolder,
    config: Mapping[str, Any],
    *,
    on_failure: Callable[[str], None],
    run_id: str,
    first_step: int = 0,
) -> Trackers:
    """Start the trackers named in the recipe's ``tracking``.

    ``config`` is the recipe as a nested mapping. ``run_id`` lets a resumed run go on in the same curve, behind
    ``first_step``. Where wandb and mlflow send things is theirs to decide (WANDB_MODE, MLFLOW_TRACKING_URI, ...);
    without MLFLOW_TRACKING_URI mlflow writes into the run folder.

    Raises MachineError when one cannot be started: what the recipe asks for is done or refused.
    """
    check_trackers(names)
    starters = {"tensorboard": _start_tensorboard, "wandb": _start_wandb, "mlflow": _start_mlflow}
    started: list[TrackerThread] = []
    for name in names:
        try:
            start = partial(starters[name], folder, config, run_id, first_step)
            started.append(TrackerThread(name, start))
        except Exception as error:  # whatever its library raises when it finds no login, server or room
            Trackers(started, on_failure).finish()
            raise MachineError(
                f"tracking: {name} could not be started ({first_line(error)}); mend that, or take it out of `tracking`"
            ) from error
    return Trackers(started, on_failure)


def _start_tensorboard(folder: RunFolder, config: Mapping[str, Any], _run_id: str, first_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run logged behind its last checkpoint is hidden: those steps are done again.
    purge_step = first_step + 1 if first_step else None
    writer = SummaryWriter(str(folder.tensorboard), purge_step=purge_step, flush_secs=10)
    if not first_step:
        code = "\n".join(f"    {line}" for line in json.dumps(config, indent=2, ensure_ascii=False).splitlines())
        writer.add_text("recipe", code)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", log, writer.close)


def _start_wandb(folder: RunFolder, config: Mapping[str, Any], run_id: str, _first_step: int) -> Tracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "trainkit"),
        name=os.environ.get("WANDB_NAME", folder.root.name),
        id=run_id,
        resume="allow",
        dir=folder.root,
        config=dict(config),
        settings=wandb.Settings(console="off"),  # the run's output is the user's, not wandb's to wrap
    )

    def log(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return Tracker("wandb", log, run.finish)


def _start_mlflow(folder: RunFolder, config: Mapping[str, Any], run_id: str, _first_step: int) -> Tracker:
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{folder.root / 'mlflow.db'}")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "trainkit"))
    before = mlflow.search_runs(filter_string=f"tags.trainkit_run_id = '{run_id}'", output_format="list")
    if before:
        mlflow.start_run(run_id=before[0].info.run_id)
    else:
        mlflow.start_run(run_name=folder.root.name, tags={"trainkit_run_id": run_id})
        mlflow.log_params({name: str(value) for name, value in _flat(config).items()})

    def log(step: int, numbers: Mapping[str, float]) -> None:
        mlflow.log_metrics(dict(numbers), step=step)

    return Tracker("mlflow", log, mlflow.end_run)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys; lists stay.

    >>> _flat({"model": {"name": "tiny"}, "tracking": []})
    {'model.name': 'tiny', 'tracking': []}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
