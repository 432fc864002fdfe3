"""`trainkit fine-tune`: from a recipe to a verified result. :func:`_run`, read from top to bottom, is the program."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, NoReturn

from trainkit.console import Console, TrainingView
from trainkit.data.encoding import Encoder
from trainkit.data.preparation import PreparedData, default_cache, prepare
from trainkit.data.sources import source_files
from trainkit.errors import CheckpointError, DataError, DivergedError, LostProcessError, MachineError, Stopped
from trainkit.launched import Launched, is_first_to_fail, launch_option, launched, send_output_to, terminal
from trainkit.memory.fit import advice_after_failure, fit
from trainkit.memory.machine import forget_peak, held_in_words, is_out_of_memory, peak_memory_bytes
from trainkit.model.checking import code_of_model
from trainkit.model.export import save_result, verify_result, verify_tokenizer
from trainkit.model.loading import check_extras
from trainkit.model.precision import plan_precision
from trainkit.model.result_folder import check_free
from trainkit.model.trusted_code import FLAG as TRUST_FLAG
from trainkit.recipe.reader import recipe_as_yaml
from trainkit.run_folder import RunFolder, write_json
from trainkit.training.agreement import check_agreement, given_here
from trainkit.training.assembly import Base, assemble, base_fingerprint, check_sharding, read_base, whole_model
from trainkit.training.checkpoint import load_checkpoint, newest_checkpoint, step_name, step_of
from trainkit.training.environment import describe_environment
from trainkit.training.evaluation import Answer, answer_prompts, check_last_update, evaluate_loss, stop_ids
from trainkit.training.heartbeats import heartbeats
from trainkit.training.interruption import Interruption
from trainkit.training.loop import Trainer, check_against_ledger, json_numbers, rehearse, remarks, train
from trainkit.training.metrics import (
    MetricsLog,
    NoLog,
    Trackers,
    check_trackers,
    open_trackers,
    read_metrics,
    read_samples,
)
from trainkit.training.plan import learning_rate_at, make_plan
from trainkit.training.processes import (
    any_of,
    device_of_this_process,
    from_first,
    is_of_lost_process,
    make_accelerator,
    prepares_alone,
)
from trainkit.training.report import write_report
from trainkit.training.retention import Retention
from trainkit.training.run_record import (
    LENGTH,
    RunRecord,
    begin_run,
    check_continuation,
    check_output,
    continue_run,
    finish_run,
    has_begun,
    is_ours,
    locked,
    put_aside,
    read_own_recipe,
    read_record,
)
from trainkit.training.saving import Saver, check_space
from trainkit.training.step import HalfUpdatedError, StopRequested

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from accelerate import Accelerator

    from trainkit.model.precision import PrecisionPlan
    from trainkit.model.trusted_code import Trust
    from trainkit.recipe.reader import ReadRecipe
    from trainkit.recipe.schema import Recipe


def fine_tune(read: ReadRecipe, *, trust: Trust | None = None, fresh: bool, json_output: bool) -> None:
    """Run the recipe, continue it, or say that it is finished; the error tree lists what may be raised."""
    here = launched()
    with ExitStack() as stack:
        nowhere = None if here.speaks else stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        console = stack.enter_context(Console(json_only=json_output, stdout=nowhere, stderr=nowhere))
        interruption = stack.enter_context(Interruption(lambda signal: console.at_once(_heard(signal))))
        try:
            console.result(_run(read, here, trust, fresh=fresh, console=console, interruption=interruption))
        except KeyboardInterrupt:
            raise _stopped(interruption, "before training began or went on", "nothing is lost", early=True) from None
        except (RuntimeError, OSError) as error:
            if not is_of_lost_process(error):
                raise
            raise LostProcessError from error


def _run(
    read: ReadRecipe,
    here: Launched,
    trust: Trust | None,
    *,
    fresh: bool,
    console: Console,
    interruption: Interruption,
) -> dict[str, Any]:
    recipe = read.recipe
    folder = check_output(recipe.output_dir)
    _warn_if_moved(read, folder, console)
    check_extras(recipe)
    check_trackers(recipe.tracking)
    device = device_of_this_process()
    precision = plan_precision(recipe.precision, device)
    if here.shards:
        check_sharding(recipe)
    with nullcontext() if trust is None else prepares_alone(default_cache()):  # the code is copied, and then imported
        base = read_base(recipe, trust)
    encoder = Encoder(base.tokenizer, recipe.data, recipe.packing)
    with prepares_alone(default_cache()):
        data = prepare(recipe, encoder, default_cache(), console.progress)
    _show_facts(console, [*base.facts, *(("data", sentence) for sentence in data.sentences)])
    data.train.ledger.check()
    console.show("\n".join(data.train.ledger.lines()))

    with ExitStack() as stack:
        earlier, start = None, Start()
        if here.speaks:
            stack.enter_context(locked(folder))
            earlier = None if fresh else _earlier_run(folder, recipe, base, data)
            start = _start(recipe, folder, earlier, base, data, device, here, console, fresh=fresh)
        accelerator = _met(recipe, folder, base, data, precision, here, interruption)
        start = Start(**from_first(accelerator, asdict(start)))
        if start.finished:
            _show_facts(console, [("run", f"already finished, nothing to do: {folder.final} (--fresh trains anew)")])
            if here.speaks and not folder.report.exists():  # it could not be written at the end
                _write_page(folder, console)
            return dict(json.loads(folder.summary.read_bytes())) if here.speaks else {}
        stack.enter_context(heartbeats(accelerator, partial(_say_at_once, console), console.warn))
        trainer, facts = assemble(recipe, base, data.train, precision, start.micro_batch_size, accelerator)
        _show_facts(console, facts)
        checkpoint = None if start.checkpoint is None else Path(start.checkpoint)
        record = None
        if here.speaks:
            check_space(
                folder.checkpoints,
                None if earlier is None else earlier.record.run_id,
                trainer.trained_weights(),
                optimizer=recipe.training.optimizer,
                checkpoints=_checkpoints_at_a_time(recipe, trainer, data),
            )
            if fresh and folder.marker.exists():
                _show_facts(console, [("run", f"the earlier one was put aside: {put_aside(folder)}")])
                stack.enter_context(locked(folder))  # the first lock has moved with it
            if earlier is None:
                record = begin_run(
                    folder,
                    recipe,
                    data_key=data.key,
                    base_model=base_fingerprint(base.location),
                    micro_batch_size=start.micro_batch_size,
                    trusted_code=_trusted_code(base),
                )
            else:
                record = _continued(folder, earlier, recipe, trainer, start, console)
            _write_circumstances(folder, recipe, base, data, trainer)
        record = RunRecord(**from_first(accelerator, None if record is None else asdict(record)))
        if not here.speaks:
            send_output_to(folder.logs / f"rank-{here.rank}.log")
        memory = Memory(device, start.predicted_bytes)
        saver = Saver(
            folder.checkpoints,
            record.run_id,
            partial(from_first, accelerator) if trainer.is_sharded else lambda value: value,
        )
        run = Run(read, folder, record, base, encoder, data, trainer, interruption, console, memory, saver)
        return run.to_the_end(checkpoint)


def _warn_if_moved(read: ReadRecipe, folder: RunFolder, console: Console) -> None:
    """Say that a run's own recipe names another folder than the one it lies in: nothing of this one is continued."""
    if not read.path or read.origins["output_dir"] == "--set":
        return
    here = RunFolder(Path(read.path).resolve().parent)
    if here.root != folder.root and here.marker.is_file() and is_ours(here.marker):
        option = shlex.join(["--set", f"output_dir={here.root}"])
        console.warn(f"output_dir: {folder.root}, not the run folder that {read.path} lies in; {option} continues that")


def _met(
    recipe: Recipe,
    folder: RunFolder,
    base: Base,
    data: PreparedData,
    precision: PrecisionPlan,
    here: Launched,
    interruption: Interruption,
) -> Accelerator:
    """Where the processes of the run meet. Raises UsageError in all of them unless they were given the same."""
    with interruption.ending_at_once() if here.processes > 1 else nullcontext():
        accelerator = make_accelerator()
    if here.processes > 1:  # before any other collective, since those of two kinds of run do not match
        given = given_here(
            recipe,
            output_dir=folder.root,
            precision=precision.name,
            shards=here.shards,
            trusted_code=_trusted_code(base),
            data_key=data.key,
            base_model=base_fingerprint(base.location),
        )
        check_agreement(accelerator, given)
    return accelerator


@dataclass(frozen=True)
class Start:
    """What the first process decides for all: where to begin, and with how many rows; or that nothing is to be done."""

    finished: bool = False
    checkpoint: str | None = None
    micro_batch_size: int = 0
    predicted_bytes: int | None = None


def _start(
    recipe: Recipe,
    folder: RunFolder,
    earlier: EarlierRun | None,
    base: Base,
    data: PreparedData,
    device: torch.device,
    here: Launched,
    console: Console,
    *,
    fresh: bool,
) -> Start:
    """See :class:`Start`; nothing is changed, and whatever speaks against the run is raised."""
    if earlier is not None and earlier.is_finished and folder.final.is_dir() and folder.summary.is_file():
        return Start(finished=True)
    checkpoint = None if earlier is None else _checkpoint_to_continue(folder, earlier, console)
    if not fresh:
        check_free(folder.final, replace=True)
    if checkpoint is not None:
        _check_steps_left(recipe, folder, step_of(checkpoint), len(data.train))
    fitted = fit(recipe, base.location.folder, device, here)
    _show_facts(console, [("memory", sentence) for sentence in fitted.sentences])
    of_the_run = None if earlier is None else earlier.micro_batch_size(recipe)
    return Start(
        checkpoint=None if checkpoint is None else str(checkpoint),
        micro_batch_size=of_the_run or fitted.micro_batch_size,
        predicted_bytes=fitted.predicted_bytes,
    )


def _check_steps_left(recipe: Recipe, folder: RunFolder, done: int, rows: int) -> None:
    length = recipe.packing.sequence_length
    steps = make_plan(recipe.training, rows=rows, sequence_length=length, micro_batch_size=1).steps
    if done > steps:
        raise CheckpointError(
            f"{folder.root}: {done} steps are done already, the recipe now ends after {steps}; ask for {done} or "
            "more, or give another output_dir"
        )


def _stopped(interruption: Interruption, when: str, state: str, *, early: bool = False) -> Stopped:
    """What ends a run that a signal stopped at once."""
    signal = interruption.received or Signals.SIGINT
    return Stopped(
        f"{signal.name} {when}: {state}; the same command goes on from here",
        by_keyboard=signal is Signals.SIGINT,
        launcher_tells=early,
    )


def _write_page(folder: RunFolder, console: Console) -> None:
    """Write report.html, or say why not: the result is there and verified, and its page must not undo that."""
    try:
        write_report(folder)
    except (OSError, CheckpointError) as error:
        console.warn(f"{folder.report}: not written: {error}")
    except (LookupError, TypeError, ValueError):  # a line that is JSON, and yet none of ours
        console.warn(f"{folder.report}: not written: {folder.metrics.name} or {folder.samples.name} is damaged")


def _say_at_once(console: Console, line: str) -> None:
    """Say why the run ends, from another thread than the main one; only the first process to fail says it."""
    if is_first_to_fail(LostProcessError.exit_code):
        Console(stderr=terminal()).at_once(f"error: {line}")
    console.close()


def _show_facts(console: Console, facts: list[tuple[str, str]]) -> None:
    """One line a fact; the topic stands only before the first of its lines."""
    before = ""
    for topic, sentence in facts:
        console.show(f"{topic if topic != before else '':<10} {sentence}")
        before = topic


@dataclass(frozen=True)
class EarlierRun:
    """The run that the folder holds: its record, the recipe it had, and what differs now that may."""

    record: RunRecord
    recipe: Recipe
    changes: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do, the new recipe asking for no more."""
        return self.record.finished and not any(change.startswith(LENGTH) for change in self.changes)

    def micro_batch_size(self, recipe: Recipe) -> int | None:
        """That of the run, unless the recipe names another one; None where it now says auto."""
        asked = recipe.training.micro_batch_size
        if asked == self.recipe.training.micro_batch_size:
            return self.record.micro_batch_size
        return None if asked == "auto" else asked


def _earlier_run(folder: RunFolder, recipe: Recipe, base: Base, data: PreparedData) -> EarlierRun | None:
    """The run to continue; None where there is none, or none that ever took a step."""
    if not has_begun(folder):
        return None
    record = read_record(folder)
    if record is None:
        return None
    fingerprint = base_fingerprint(base.location)
    changes = check_continuation(
        folder, record, recipe, data_key=data.key, base_model=fingerprint, trusted_code=_trusted_code(base)
    )
    return EarlierRun(record, read_own_recipe(folder), tuple(changes))


def _trusted_code(base: Base) -> str:
    """Whose code came with the model and is run, as the flag names it; nothing where none is."""
    return "" if base.location.code is None else str(base.location.code)


def _checkpoint_to_continue(folder: RunFolder, earlier: EarlierRun, console: Console) -> Path | None:
    """The newest checkpoint that verifies; why newer ones are passed over is said."""
    found, skipped = newest_checkpoint(folder.checkpoints, earlier.record.run_id)
    for sentence in skipped:
        console.warn(f"{folder.checkpoints}: {sentence}")
    if found is None and earlier.record.finished:
        raise CheckpointError(
            f"{folder.final}: finished, but its result is gone and no checkpoint is left to make it from; "
            "--fresh trains anew"
        )
    return found


def _continued(
    folder: RunFolder,
    earlier: EarlierRun,
    recipe: Recipe,
    trainer: Trainer,
    start: Start,
    console: Console,
) -> RunRecord:
    """Take over what the recipe changes for the rest of the run, and say what follows from it."""
    plan, done = trainer.plan, 0 if start.checkpoint is None else step_of(Path(start.checkpoint))
    sentences = [f"changed: {change}" for change in earlier.changes]
    if start.checkpoint is None:
        lines = folder.metrics.read_bytes().count(b"\n") if folder.metrics.is_file() else 0
        dropped = f" ({lines} logged lines are dropped)" if lines else ""
        sentences.append(f"begins anew: no checkpoint to continue from in {folder.checkpoints}{dropped}")
    if any(change.startswith(LENGTH) for change in earlier.changes) and done < plan.steps:
        before = make_plan(
            earlier.recipe.training,
            rows=plan.rows,
            sequence_length=recipe.packing.sequence_length,
            micro_batch_size=plan.micro_batch_size,
            processes=plan.processes,
        )
        old = f"{learning_rate_at(before, done):.3g}" if done < before.steps else "none"
        sentences.append(
            f"the learning rate follows the schedule of all {plan.steps} steps from here on: step {done + 1} takes "
            f"{learning_rate_at(plan, done):.3g} (before: {old})"
        )
    _show_facts(console, [("run", sentence) for sentence in sentences])
    return continue_run(folder, earlier.record, recipe, micro_batch_size=start.micro_batch_size)


def _checkpoints_at_a_time(recipe: Recipe, trainer: Trainer, data: PreparedData) -> int:
    """How many will lie on the disk at most, without one in the making."""
    wanted, steps = recipe.checkpoints, trainer.plan.steps
    keeps_best = wanted.keep_best and data.evaluation is not None
    if keeps_best:
        return wanted.keep_last + 1
    return min(wanted.keep_last, -(-steps // (wanted.every_steps or steps)))


def _write_circumstances(folder: RunFolder, recipe: Recipe, base: Base, data: PreparedData, trainer: Trainer) -> None:
    sources = recipe.data.train + (recipe.data.eval if isinstance(recipe.data.eval, tuple) else ())
    environment = describe_environment(
        trainer.accelerator.device,
        seed=recipe.training.seed,
        processes=trainer.accelerator.num_processes,
        data_files=[file for source in sources for file in source_files(source)],
        trusted_code=_trusted_code(base),
    )
    write_json(folder.environment, environment)
    write_json(folder.ledger, data.train.ledger.to_json())


@dataclass
class Memory:
    """The peak as predicted, and as measured so far; bytes allocated on a GPU, resident on a CPU."""

    device: torch.device
    predicted_bytes: int | None
    steps_seen: int = 0
    highest_bytes: int = 0

    def after_step(self) -> dict[str, int]:
        """What the second step of this process took, for its line of metrics.jsonl; nothing after any other.

        The first step is unlike all others: the optimizer's state is made at its end.
        """
        self.steps_seen += 1
        if self.steps_seen != 2 or self.predicted_bytes is None:
            return {}
        measured = peak_memory_bytes(self.device)
        return {"memory_predicted_bytes": self.predicted_bytes, "memory_measured_bytes": measured}

    def predicted_with(self, copied_bytes: int) -> int | None:
        """The peak of the whole run, where a copy of the state was made in host memory to be saved beside training."""
        if self.predicted_bytes is None:
            return None
        return self.predicted_bytes + (copied_bytes if self.device.type == "cpu" else 0)

    def before_step(self) -> None:
        """Let the peak of the second step be its own, without what came before it."""
        if self.steps_seen == 1:
            self.highest_bytes = peak_memory_bytes(self.device)
            forget_peak(self.device)

    def measured_bytes(self) -> int:
        """The peak of the whole run."""
        return max(self.highest_bytes, peak_memory_bytes(self.device))


@dataclass
class Run:
    """A run under way: what is logged, evaluated, saved and shown around the steps."""

    read: ReadRecipe
    folder: RunFolder
    record: RunRecord
    base: Base
    encoder: Encoder
    data: PreparedData
    trainer: Trainer
    interruption: Interruption
    console: Console
    memory: Memory
    saver: Saver
    save_pause_seconds: list[float] = field(default_factory=list)
    metrics: MetricsLog | NoLog = field(default_factory=NoLog)
    samples: MetricsLog | NoLog = field(default_factory=NoLog)

    @property
    def speaks(self) -> bool:
        """Whether this process records and writes what is written once."""
        return bool(self.trainer.accelerator.is_main_process)

    def _stop_requested(self) -> bool:
        """Whether a signal came, in any process; all must ask."""
        return any_of(self.trainer.accelerator, self.interruption.requested())

    def to_the_end(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train what is left behind ``checkpoint``, save and verify the result, and return the summary."""
        try:
            self._train_and_record(checkpoint)
        except KeyboardInterrupt as error:  # the second Ctrl+C, which waits for nothing, or one before the first step
            if is_of_lost_process(error.__context__):  # the launcher stopped this process as well
                raise LostProcessError from error
            raise _stopped(self.interruption, "stopped the run at once", self._newest()) from None
        try:
            return self._finish()
        except KeyboardInterrupt:
            raise _stopped(self.interruption, "while the result was written", "training is done and saved") from None

    def _train_and_record(self, checkpoint: Path | None) -> None:
        with ExitStack() as stack:
            if self.speaks:
                self.metrics = stack.enter_context(MetricsLog(self.folder.metrics, self.console.warn))
                self.samples = stack.enter_context(MetricsLog(self.folder.samples, self.console.warn))
            stack.enter_context(self.saver)
            self._continue_from(checkpoint)
            self.trackers = self._open_trackers()
            stack.callback(self.trackers.finish)
            try:
                rehearse(self.trainer)
                with self.interruption.deferring():
                    self._train()
            except (RuntimeError, MemoryError) as error:
                reason = error.__cause__ if isinstance(error, HalfUpdatedError) else error
                if reason is None or not is_out_of_memory(reason):
                    raise
                raise MachineError(self._out_of_memory(error)) from error
            except (DivergedError, DataError) as error:
                raise type(error)(f"{error}. {self._newest()}") from error

    def _continue_from(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.metrics.truncate_to(0)
            self.samples.truncate_to(0)
            return
        state = load_checkpoint(checkpoint)
        self.trainer.restore(state)
        self.metrics.truncate_to(state.log_bytes["metrics"])
        self.samples.truncate_to(state.log_bytes["samples"])
        _show_facts(self.console, [("run", f"continues after step {state.step}, from {checkpoint}")])

    def _open_trackers(self) -> Trackers:
        return open_trackers(
            self.read.recipe.tracking if self.speaks else (),
            self.folder,
            asdict(self.read.recipe),
            on_failure=self.console.warn,
            run_id=self.record.run_id,
            first_step=self.trainer.counters.step,
        )

    def _train(self) -> None:
        """The loop, with what happens between steps written out."""
        steps = self.trainer.plan.steps
        with TrainingView(self.console) as view:
            self._evaluate_if_due(view)
            if self.trainer.counters.step:  # after the evaluation, which may say of another checkpoint that it is best
                self.saver.tidy(self._retention(), self.trainer.counters.step)
            for report in train(self.trainer, self._stop_requested):
                self.saver.check()
                numbers = json_numbers(report) | self.memory.after_step()
                if self.save_pause_seconds:
                    numbers["save_pause_seconds"] = self.save_pause_seconds.pop()
                self.metrics.append(numbers)
                self.trackers.log(report.step, numbers)
                for line in remarks(report):
                    view.message(line)
                view.update(
                    step=report.step,
                    steps=steps,
                    loss=report.result.loss,
                    learning_rate=report.result.learning_rate,
                    tokens_per_second=numbers["tokens_per_second"],
                )
                self._evaluate_if_due(view)
                self._save_if_due()
                self.memory.before_step()
        self.saver.wait()
        if self._stop_requested():
            self._stop()

    def _evaluate_if_due(self, view: TrainingView) -> None:
        """Evaluate before the first step, at intervals and after the last; never twice at the same step."""
        counters, every = self.trainer.counters, self.read.recipe.evaluation.every_steps
        at_an_end = counters.step in {0, self.trainer.plan.steps} or counters.evaluation_missing
        if self.data.evaluation is None and counters.step == self.trainer.plan.steps:
            check_last_update(self.trainer)
        due = at_an_end or (every is not None and counters.step % every == 0)
        if self.data.evaluation is None or not due or counters.evaluated_step == counters.step:
            return
        try:
            result = evaluate_loss(self.trainer, self.data.evaluation, self._stop_requested, self.console.progress)
            answers = self._answer(compare=at_an_end)
        except StopRequested:
            counters.evaluation_missing = at_an_end and counters.step > 0
            self._stop()
        counters.note_evaluation(result.loss)
        numbers: dict[str, Any] = {
            "step": counters.step,
            "eval_loss": result.loss,
            "eval_tokens": result.trained_tokens,
        }
        if at_an_end and (compared := answers[: self.read.recipe.evaluation.exact_match]):
            numbers["exact_match"] = sum(answer.match for answer in compared) / len(compared)
            numbers["exact_match_prompts"] = len(compared)
        self.metrics.append(numbers)
        self.trackers.log(counters.step, numbers)
        for answer in answers[: self.read.recipe.evaluation.samples]:
            self.samples.append(answer.json_line(counters.step))
        view.update(step=counters.step, steps=self.trainer.plan.steps, eval_loss=result.loss)

    def _answer(self, *, compare: bool) -> list[Answer]:
        """Greedy answers to the first held-out prompts: those to show and, with ``compare``, those to score."""
        wanted = self.read.recipe.evaluation
        count = max(wanted.samples, wanted.exact_match) if compare else wanted.samples
        chosen = self.data.prompts[:count]
        prompts = [(place, prompt) for place, parsed in chosen if (prompt := self.encoder.prompt(parsed, place))]
        room = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        if room is not None:  # a model with learned positions has none beyond
            prompts = [(place, prompt) for place, prompt in prompts if len(prompt.ids) + wanted.max_new_tokens <= room]
        return answer_prompts(
            self.trainer,
            self.base.tokenizer,
            prompts,
            stop_ids=stop_ids(self.base.tokenizer, [self.encoder.encode(parsed, place) for place, parsed in chosen]),
            max_new_tokens=wanted.max_new_tokens,
            should_stop=self._stop_requested,
            on_progress=self.console.progress,
        )

    def _save_if_due(self) -> None:
        """Save at intervals, after the last step, and where the evaluation loss is the lowest so far."""
        counters, wanted = self.trainer.counters, self.read.recipe.checkpoints
        at_interval = wanted.every_steps is not None and counters.step % wanted.every_steps == 0
        is_best = wanted.keep_best and counters.best_step == counters.step
        if at_interval or is_best or counters.step == self.trainer.plan.steps:
            self._save()

    def _save(self) -> None:
        """Begin to commit the full training state; older checkpoints go after that."""
        self.metrics.sync()
        self.samples.sync()
        state = self.trainer.state(
            {"metrics": self.metrics.length_bytes, "samples": self.samples.length_bytes},
        )
        if self.speaks or state.share.processes > 1:
            self.save_pause_seconds = [self.saver.save(state, self._retention())]

    def _retention(self) -> Retention:
        keep = self.read.recipe.checkpoints
        return Retention(keep.keep_last, self.trainer.counters.best_step if keep.keep_best else None)

    def _stop(self) -> NoReturn:
        """Save what there is and end with the exit code of the signal."""
        signal = self.interruption.received or Signals.SIGTERM  # which another process received
        self._save()
        self.saver.wait()
        self.trainer.accelerator.wait_for_everyone()
        counters = self.trainer.counters
        trusted = _trusted_code(self.base)
        flag = (TRUST_FLAG, trusted) if trusted else ()
        command = shlex.join(["trainkit", "fine-tune", str(self.folder.recipe), *flag, *launch_option()])
        raise Stopped(
            f"{signal.name} after step {counters.step} of {self.trainer.plan.steps}; state saved in "
            f"{self.folder.checkpoints / step_name(counters.step)}; "
            f"to continue: {command}",
            by_keyboard=signal is Signals.SIGINT,
        )

    def _newest(self) -> str:
        self.saver.settle()
        found, _ = newest_checkpoint(self.folder.checkpoints, self.record.run_id)
        return f"Newest good checkpoint: {found}" if found else "No checkpoint was saved yet"

    def _out_of_memory(self, error: Exception) -> str:
        """What was held, what would take less, and where the state is; saves it unless the update itself broke off."""
        plan, counters, device = self.trainer.plan, self.trainer.counters, self.trainer.accelerator.device
        held = held_in_words(device)
        for failed in filter(None, (error, error.__cause__)):
            clear_frames(failed.__traceback__)  # activations would stay alive as long as the traceback does
        unsaved = ""
        if counters.step and not isinstance(error, HalfUpdatedError):
            try:
                self._save()
                self.saver.wait()
            except (RuntimeError, MemoryError, MachineError) as failure:
                unsaved = f"The state after this step could not be saved ({str(failure)[:80] or 'no memory'}). "
        rows = plan.micro_batch_size
        advice = advice_after_failure(self.read.recipe, self.base.location.folder, device, rows)
        return (
            f"after step {counters.step} of {plan.steps}: {rows} row{'s' * (rows > 1)} of "
            f"{self.trainer.packing.sequence_length:,} tokens do not fit in the memory of {device}, which held {held}; "
            f"{advice}. {unsaved}{self._newest()}"
        )

    def _finish(self) -> dict[str, Any]:
        """Save the result, load it anew and compare, and say what came of it."""
        trainer, counters = self.trainer, self.trainer.counters
        ledger = self.data.train.ledger
        assert counters.step == trainer.plan.steps, f"{counters.step} of {trainer.plan.steps} steps were done"
        check_against_ledger(counters, trainer.plan, ledger)
        measured_bytes = self.memory.measured_bytes()
        precision = trainer.precision
        model = whole_model(self.read.recipe, self.base, precision, trainer)
        if model is None:
            return {}
        sentences = save_result(
            model,
            self.base.tokenizer,
            self.folder.final,
            location=self.base.location,
            recipe_yaml=recipe_as_yaml(self.read.recipe),
            ledger_lines=ledger.lines(),
            metrics=asdict(counters),
            chat_template=self.encoder.chat_template,
        )
        row = trainer.rows.row(0)
        first_document_T = row.ids_T[: int(row.segment_lengths[0])]
        code = self.base.location.code
        sentences += verify_result(self.folder.final, model, first_document_T, code_of_model(self.base.location))
        verify_tokenizer(self.folder.final, self.base.tokenizer, self.encoder.chat_template, code)
        summary: dict[str, Any] = {
            "output_dir": str(self.folder.root),
            "final": str(self.folder.final),
            "steps": counters.step,
            "updates": counters.updates,
            "eval_loss_before": counters.eval_loss_before,
            "eval_loss_after": counters.eval_loss,
            "trained_tokens": counters.trained_tokens,
            "skipped": counters.step - counters.updates,
            "skipped_tokens": counters.skipped_tokens,
            "spikes": counters.spikes,
            "peak_memory_predicted_bytes": self.memory.predicted_with(self.saver.copied_bytes),
            "peak_memory_measured_bytes": measured_bytes,
            "checkpoints": self.saver.checkpoints,
            "save_paused_seconds": self.saver.paused_seconds,
            "ledger": ledger.to_json(),
        }
        summary |= _exact_match(_logged(self.folder.metrics, read_metrics, self.console))
        write_json(self.folder.summary, summary)
        _write_page(self.folder, self.console)
        finish_run(self.folder, self.record)
        self._show_outcome(summary, sentences)
        return summary

    def _show_outcome(self, summary: dict[str, Any], sentences: tuple[str, ...]) -> None:
        for first, last in _answers_before_and_after(_logged(self.folder.samples, read_samples, self.console)):
            self.console.show(f"\n{first['prompt'].strip()}")
            self.console.show(f"  before  {first['answer'].strip()}")
            self.console.show(f"  after   {last['answer'].strip()}")
        self.console.show()
        facts = [("result", sentence) for sentence in sentences]
        if summary["eval_loss_before"] is not None:
            facts.append(("eval loss", f"{summary['eval_loss_before']:.4f} → {summary['eval_loss_after']:.4f}"))
        if "exact_match_after" in summary:
            facts.append(
                (
                    "exact",
                    f"{summary['exact_match_before']:.0%} → {summary['exact_match_after']:.0%} of the held-out answers",
                )
            )
        if summary["skipped"]:
            tokens = f"{summary['skipped_tokens']:,} tokens were seen and not trained"
            facts.append(("skipped", f"{summary['skipped']} of {summary['steps']} steps had no update; {tokens}"))
        if summary["spikes"]:
            facts.append(("spikes", f"{summary['spikes']} in the loss; metrics.jsonl and the report name their rows"))
        predicted, measured = summary["peak_memory_predicted_bytes"], summary["peak_memory_measured_bytes"]
        said = "not predicted" if predicted is None else f"{predicted / 2**20:,.0f} MiB predicted"
        if self.saver.checkpoints:
            size, paused = self.saver.size_bytes / 2**20, self.saver.paused_seconds
            made = f"{self.saver.checkpoints} checkpoint{'s' * (self.saver.checkpoints > 1)} of {size:,.1f} MiB"
            facts.append(("saving", f"{made}; training paused {paused:.2f} s for them"))
        facts.append(("memory", f"peak {measured / 2**20:,.0f} MiB measured, {said}"))
        facts.append(("done", f"{self.folder.final} · report: {self.folder.report}"))
        _show_facts(self.console, facts)


def _heard(signal: Signals) -> str:
    """Said at once, because the micro-batch that has to end first may take long."""
    return f"{signal.name} received: saving as soon as it is possible; a second Ctrl+C stops without saving"


def _logged(path: Path, read: Callable[[Path], list[dict[str, Any]]], console: Console) -> list[dict[str, Any]]:
    """The lines of a log, or none where it is damaged, which is said: it must not undo a result that is verified."""
    try:
        return read(path)
    except (OSError, CheckpointError) as error:
        console.warn(f"{error}; what it tells of the run is left out here")
        return []


def _exact_match(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The first and the last exact-match score of metrics.jsonl, where there are any."""
    scores = [line["exact_match"] for line in metrics if isinstance(line.get("exact_match"), int | float)]
    if len(scores) < 2:  # a line that could not be written is no score
        return {}
    return {"exact_match_before": scores[0], "exact_match_after": scores[-1]}


def _answers_before_and_after(samples: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The lines of samples.jsonl of the first and of the last evaluation, for each prompt that stands in both.

    How many are answered may change where a run is continued.
    """
    if not samples:
        return []
    before, after = ([line for line in samples if line["step"] == end["step"]] for end in (samples[0], samples[-1]))
    answered = {line["place"]: line for line in after}
    return [(line, answered[line["place"]]) for line in before if line["place"] in answered]
