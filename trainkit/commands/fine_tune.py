"""`trainkit fine-tune`: from a recipe to a verified result. :func:`_run`, read from top to bottom, is the program."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from signal import Signals
from typing import TYPE_CHECKING, Any, NoReturn

from accelerate import Accelerator

from trainkit.console import Console, TrainingView
from trainkit.data.encoding import Encoder
from trainkit.data.preparation import PreparedData, default_cache, prepare
from trainkit.data.sources import source_files
from trainkit.errors import CheckpointError, DivergedError, MachineError, Stopped, UsageError
from trainkit.memory.fit import fit
from trainkit.memory.machine import forget_peak, is_out_of_memory, peak_memory_bytes
from trainkit.model.export import save_result, verify_result
from trainkit.model.loading import check_extras
from trainkit.model.precision import plan_precision
from trainkit.recipe.reader import recipe_as_yaml
from trainkit.run_folder import RunFolder, write_json
from trainkit.training.assembly import Base, assemble, base_fingerprint, read_base
from trainkit.training.checkpoint import load_checkpoint, newest_checkpoint, retire_checkpoints, save_checkpoint
from trainkit.training.environment import describe_environment
from trainkit.training.evaluation import Answer, answer_prompts, check_last_update, evaluate_loss, stop_ids
from trainkit.training.interruption import Interruption
from trainkit.training.loop import Trainer, check_against_ledger, json_numbers, rehearse, train
from trainkit.training.metrics import MetricsLog, Trackers, check_trackers, open_trackers, read_metrics
from trainkit.training.report import write_report
from trainkit.training.run_record import (
    RunRecord,
    begin_run,
    check_continuation,
    check_output,
    finish_run,
    has_begun,
    locked,
    put_aside,
    read_record,
)
from trainkit.training.step import StopRequested

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from trainkit.recipe.reader import ReadRecipe
    from trainkit.recipe.schema import Recipe


def fine_tune(read: ReadRecipe, *, fresh: bool, json_output: bool) -> None:
    """Run the recipe, continue it, or say that it is finished; the error tree lists what may be raised."""
    with Console(json_only=json_output) as console:
        console.result(_run(read, fresh=fresh, console=console))


def _run(read: ReadRecipe, *, fresh: bool, console: Console) -> dict[str, Any]:
    recipe = read.recipe
    folder = check_output(recipe.output_dir)
    check_extras(recipe)
    check_trackers(recipe.tracking)
    accelerator = Accelerator(mixed_precision="no")  # places, wraps and reduces; precision and accumulation are ours
    if accelerator.num_processes > 1:
        raise UsageError(
            f"{accelerator.num_processes} processes were launched: trainkit trains in one so far; launch one process"
        )
    precision = plan_precision(recipe.precision, accelerator.device)
    base = read_base(recipe)
    encoder = Encoder(base.tokenizer, recipe.data, recipe.packing)
    data = prepare(recipe, encoder, default_cache(), console.progress)
    _show_facts(console, [*base.facts, *(("data", sentence) for sentence in data.sentences)])
    data.train.ledger.check()
    console.show("\n".join(data.train.ledger.lines()))

    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        interruption = stack.enter_context(Interruption(lambda signal: console.at_once(_heard(signal))))
        record = None if fresh else _record_to_continue(folder, recipe, base, data)
        if record is not None and record.finished and folder.final.is_dir() and folder.summary.is_file():
            _show_facts(console, [("run", f"already finished, nothing to do: {folder.final} (--fresh trains anew)")])
            return dict(json.loads(folder.summary.read_bytes()))
        fitted = fit(recipe, base.location.folder, accelerator.device)
        _show_facts(console, [("memory", sentence) for sentence in fitted.sentences])
        micro_batch_size = fitted.micro_batch_size if record is None else record.micro_batch_size
        trainer, facts = assemble(recipe, base, data.train, precision, micro_batch_size, accelerator)
        _show_facts(console, facts)
        if fresh and folder.marker.exists():
            _show_facts(console, [("run", f"the earlier one was put aside: {put_aside(folder)}")])
            stack.enter_context(locked(folder))  # the first lock has moved with it
        if record is None:
            record = begin_run(
                folder,
                recipe,
                data_key=data.key,
                base_model=base_fingerprint(base.location),
                micro_batch_size=micro_batch_size,
            )
        _write_circumstances(folder, recipe, data, trainer)
        memory = Memory(accelerator.device, fitted.predicted_bytes)
        return Run(read, folder, record, base, encoder, data, trainer, interruption, console, memory).to_the_end()


def _show_facts(console: Console, facts: list[tuple[str, str]]) -> None:
    """One line a fact; the topic stands only before the first of its lines."""
    before = ""
    for topic, sentence in facts:
        console.show(f"{topic if topic != before else '':<10} {sentence}")
        before = topic


def _record_to_continue(folder: RunFolder, recipe: Recipe, base: Base, data: PreparedData) -> RunRecord | None:
    """The record of the run to continue; None where there is none, or none that ever took a step."""
    if not has_begun(folder):
        return None
    record = read_record(folder)
    if record is not None:
        check_continuation(folder, record, recipe, data_key=data.key, base_model=base_fingerprint(base.location))
    return record


def _write_circumstances(folder: RunFolder, recipe: Recipe, data: PreparedData, trainer: Trainer) -> None:
    sources = recipe.data.train + (recipe.data.eval if isinstance(recipe.data.eval, tuple) else ())
    environment = describe_environment(
        trainer.accelerator.device,
        seed=recipe.training.seed,
        processes=trainer.accelerator.num_processes,
        data_files=[file for source in sources for file in source_files(source)],
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

    def to_the_end(self) -> dict[str, Any]:
        """Train what is left, save and verify the result, and return the summary."""
        try:
            self._train_and_record()
            return self._finish()
        except KeyboardInterrupt:  # the second Ctrl+C, which waits for nothing
            raise Stopped(f"stopped at once. {self._newest()}; the same command continues", by_keyboard=True) from None

    def _train_and_record(self) -> None:
        with ExitStack() as stack:
            self.metrics = stack.enter_context(MetricsLog(self.folder.metrics, self.console.warn))
            self.samples = stack.enter_context(MetricsLog(self.folder.samples, self.console.warn))
            self._continue_from_checkpoint()
            self.trackers = self._open_trackers()
            stack.callback(self.trackers.finish)
            try:
                rehearse(self.trainer)
                self._train()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise MachineError(self._out_of_memory()) from error
            except DivergedError as error:
                raise DivergedError(f"after step {self.trainer.counters.step}: {error}. {self._newest()}") from error

    def _continue_from_checkpoint(self) -> None:
        found, skipped = newest_checkpoint(self.folder.checkpoints, self.record.run_id)
        for sentence in skipped:
            self.console.warn(f"{self.folder.checkpoints}: {sentence}")
        if found is None and self.record.finished:
            raise CheckpointError(
                f"{self.folder.final}: finished, but its result is gone and no checkpoint is left to make it from; "
                "--fresh trains anew"
            )
        if found is None:
            self.metrics.truncate_to(0)
            self.samples.truncate_to(0)
            return
        state = load_checkpoint(found)
        self.trainer.restore(state)
        self.metrics.truncate_to(state.log_bytes["metrics"])
        self.samples.truncate_to(state.log_bytes["samples"])
        _show_facts(self.console, [("run", f"continues after step {state.step}, from {found}")])

    def _open_trackers(self) -> Trackers:
        return open_trackers(
            self.read.recipe.tracking,
            self.folder,
            asdict(self.read.recipe),
            on_failure=self.console.warn,
            run_id=self.record.run_id,
            first_step=self.trainer.counters.step,
        )

    def _train(self) -> None:
        """The loop, with what happens between steps written out."""
        counters, steps = self.trainer.counters, self.trainer.plan.steps
        with TrainingView(self.console) as view:
            self._evaluate_if_due(view)
            for report in train(self.trainer, self.interruption.requested):
                numbers = json_numbers(report) | self.memory.after_step()
                self.metrics.append(numbers)
                self.trackers.log(report.step, numbers)
                if report.result.skipped:
                    scale = report.result.loss_scale
                    view.message(f"step {report.step}: fp16 gradients overflowed; no update, loss scale now {scale:g}")
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
        if counters.step < steps:
            self._stop()

    def _evaluate_if_due(self, view: TrainingView) -> None:
        """Evaluate before the first step, at intervals and after the last; never twice at the same step."""
        counters, every = self.trainer.counters, self.read.recipe.evaluation.every_steps
        at_an_end = counters.step in {0, self.trainer.plan.steps}
        if self.data.evaluation is None and counters.step == self.trainer.plan.steps:
            check_last_update(self.trainer)
        due = at_an_end or (every is not None and counters.step % every == 0)
        if self.data.evaluation is None or not due or counters.evaluated_step == counters.step:
            return
        try:
            result = evaluate_loss(
                self.trainer, self.data.evaluation, self.interruption.requested, self.console.progress
            )
            answers = self._answer(compare=at_an_end)
        except StopRequested:
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
            should_stop=self.interruption.requested,
            on_progress=self.console.progress,
        )

    def _save_if_due(self) -> None:
        """Save at intervals, after the last step, and where the evaluation loss is the lowest so far."""
        counters, wanted = self.trainer.counters, self.read.recipe.checkpoints
        at_interval = wanted.every_steps is not None and counters.step % wanted.every_steps == 0
        is_best = wanted.keep_best and counters.best_step == counters.step
        if at_interval or is_best or counters.step == self.trainer.plan.steps:
            self._save()

    def _save(self) -> Path:
        """Commit the full training state, then let older checkpoints go."""
        self.metrics.sync()
        self.samples.sync()
        state = self.trainer.state(
            {"metrics": self.metrics.length_bytes, "samples": self.samples.length_bytes},
        )
        saved = save_checkpoint(self.folder.checkpoints, self.record.run_id, state)
        keep = self.read.recipe.checkpoints
        retire_checkpoints(
            self.folder.checkpoints,
            self.record.run_id,
            keep_last=keep.keep_last,
            best_step=self.trainer.counters.best_step if keep.keep_best else None,
        )
        return saved

    def _stop(self) -> NoReturn:
        """Save what there is and end with the exit code of the signal."""
        signal = self.interruption.received
        assert signal is not None
        saved = self._save()
        counters = self.trainer.counters
        raise Stopped(
            f"{signal.name} after step {counters.step} of {self.trainer.plan.steps}; state saved in {saved}; "
            f"to continue: trainkit fine-tune {shlex.quote(str(self.folder.recipe))}",
            by_keyboard=signal is Signals.SIGINT,
        )

    def _newest(self) -> str:
        found, _ = newest_checkpoint(self.folder.checkpoints, self.record.run_id)
        return f"Newest good checkpoint: {found}" if found else "No checkpoint was saved yet"

    def _out_of_memory(self) -> str:
        plan, counters = self.trainer.plan, self.trainer.counters
        if counters.step:
            self._save()
        return (
            f"training.micro_batch_size: {plan.micro_batch_size} rows of {self.trainer.packing.sequence_length} tokens "
            f"do not fit in the memory of {self.trainer.accelerator.device}; set it smaller, or "
            f"model.activation_checkpointing: true. {self._newest()}"
        )

    def _finish(self) -> dict[str, Any]:
        """Save the result, load it anew and compare, and say what came of it."""
        trainer, counters = self.trainer, self.trainer.counters
        ledger = self.data.train.ledger
        check_against_ledger(counters, trainer.plan, ledger)
        measured_bytes = self.memory.measured_bytes()
        sentences = save_result(
            trainer.model,
            self.base.tokenizer,
            self.folder.final,
            location=self.base.location,
            recipe_yaml=recipe_as_yaml(self.read.recipe),
            ledger_lines=ledger.lines(),
            metrics=asdict(counters),
            chat_template=self.encoder.chat_template,
        )
        row = trainer.rows.row(0)
        sentences += verify_result(self.folder.final, trainer.model, row.ids_T[: int(row.segment_lengths[0])])
        summary: dict[str, Any] = {
            "output_dir": str(self.folder.root),
            "final": str(self.folder.final),
            "steps": counters.step,
            "updates": counters.updates,
            "eval_loss_before": counters.eval_loss_before,
            "eval_loss_after": counters.eval_loss,
            "trained_tokens": counters.trained_tokens,
            "peak_memory_predicted_bytes": self.memory.predicted_bytes,
            "peak_memory_measured_bytes": measured_bytes,
            "ledger": ledger.to_json(),
        }
        summary |= _exact_match(self.folder)
        write_json(self.folder.summary, summary)
        write_report(self.folder)
        finish_run(self.folder, self.record)
        self._show_outcome(summary, sentences)
        return summary

    def _show_outcome(self, summary: dict[str, Any], sentences: tuple[str, ...]) -> None:
        for first, last in _answers_before_and_after(self.folder):
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
        predicted, measured = summary["peak_memory_predicted_bytes"], summary["peak_memory_measured_bytes"]
        said = "not predicted" if predicted is None else f"{predicted / 2**20:,.0f} MiB predicted"
        facts.append(("memory", f"peak {measured / 2**20:,.0f} MiB measured, {said}"))
        facts.append(("done", f"{self.folder.final} · report: {self.folder.report}"))
        _show_facts(self.console, facts)


def _heard(signal: Signals) -> str:
    """Said at once, because the micro-batch that has to end first may take long."""
    return f"{signal.name} received: saving as soon as it is possible; a second Ctrl+C stops without saving"


def _exact_match(folder: RunFolder) -> dict[str, float]:
    """The first and the last exact-match score of metrics.jsonl, where there are any."""
    scores = [line["exact_match"] for line in read_metrics(folder.metrics) if "exact_match" in line]
    return {"exact_match_before": scores[0], "exact_match_after": scores[-1]} if scores else {}


def _answers_before_and_after(folder: RunFolder) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The lines of samples.jsonl of the first and of the last evaluation, for each prompt that stands in both.

    How many are answered may change where a run is continued.
    """
    lines = read_metrics(folder.samples)
    if not lines:
        return []
    before, after = ([line for line in lines if line["step"] == end["step"]] for end in (lines[0], lines[-1]))
    answered = {line["place"]: line for line in after}
    return [(line, answered[line["place"]]) for line in before if line["place"] in answered]
