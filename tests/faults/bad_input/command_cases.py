"""Command lines that cannot be meant."""

from __future__ import annotations

from tests.faults.bad_input.room import FINE_TUNE, Case, Room


def as_it_is(room: Room) -> None:
    room.write_recipe()


OPTION_CASES = [
    Case(
        "--set without a value",
        as_it_is,
        2,
        r"^--set training\.seed: expected section\.key=value$",
        command=(*FINE_TUNE, "--set", "training.seed"),
    ),
    Case(
        "--set with nothing behind",
        as_it_is,
        2,
        r"^--set training\.seed: nothing stands behind the `=`; write null to unset a key$",
        command=(*FINE_TUNE, "--set", "training.seed="),
    ),
    Case(
        "--set of an unknown key",
        as_it_is,
        2,
        r"^--set training\.sede: unknown key; did you mean `seed`\?$",
        command=(*FINE_TUNE, "--set", "training.sede=1"),
    ),
    Case(
        "--set of an item",
        as_it_is,
        2,
        r"^--set data\.train\[0\]\.path: lists are replaced whole;.*list: data\.train=\[a\.jsonl, b\.jsonl\]$",
        command=(*FINE_TUNE, "--set", "data.train[0].path=a"),
    ),
    Case(
        "--set of broken YAML",
        as_it_is,
        2,
        r"^--set tracking: not valid YAML: the `\[` of line 1, column 1 is not closed before here$",
        command=(*FINE_TUNE, "--set", "tracking=[a"),
    ),
    Case(
        "--set out of range",
        as_it_is,
        2,
        r"^--set training\.learning_rate: must be above 0 and at most 3\.4e\+38; got -1$",
        command=(*FINE_TUNE, "--set", "training.learning_rate=-1"),
    ),
    Case(
        "--set of extends",
        as_it_is,
        2,
        r"^--set extends: only a file can extend another$",
        command=(*FINE_TUNE, "--set", "extends=a.yaml"),
    ),
    Case(
        "--set of a section",
        as_it_is,
        2,
        r"^--set training: expected a section; got the number `5`$",
        command=(*FINE_TUNE, "--set", "training=5"),
    ),
    Case(
        "--set with dots alone",
        as_it_is,
        2,
        r"^--set training\.\.seed: the key has an empty part between its dots$",
        command=(*FINE_TUNE, "--set", "training..seed=5"),
    ),
    Case(
        "an unknown command",
        as_it_is,
        2,
        r"^No such command 'finetune'\. Did you mean 'fine-tune'\? See `trainkit --help`$",
        command=("finetune", "recipe.yaml"),
    ),
    Case(
        "an unknown option",
        as_it_is,
        2,
        r"^No such option: --frsh \(Possible options: --fresh\); see `trainkit fine-tune --help`$",
        command=(*FINE_TUNE, "--frsh"),
    ),
    Case(
        "no recipe",
        as_it_is,
        2,
        r"^Missing argument 'RECIPE'; see `trainkit fine-tune --help`$",
        command=("fine-tune",),
    ),
    Case(
        "two recipes",
        as_it_is,
        2,
        r"^Got unexpected extra argument\(s\) \(recipe\.yaml\); see `trainkit fine-tune --help`$",
        command=(*FINE_TUNE, "recipe.yaml"),
    ),
    Case(
        "an option without its value",
        as_it_is,
        2,
        r"^Option '--set' requires an argument; see `trainkit --help`$",
        command=(*FINE_TUNE, "--set"),
    ),
    Case(
        "no examples to show",
        as_it_is,
        2,
        r"^Invalid value for '--examples': Input should be.*see `trainkit inspect-data --help`$",
        command=("inspect-data", "recipe.yaml", "--examples", "0"),
    ),
    Case(
        "examples in words",
        as_it_is,
        2,
        r"^Invalid value for '--examples': Input should be a.*see `trainkit inspect-data --help`$",
        command=("inspect-data", "recipe.yaml", "--examples", "three"),
    ),
    Case(
        "memory in words",
        as_it_is,
        2,
        r"^--memory: `much` is no amount of memory; write a number and a unit, as 24GiB or 80GB$",
        command=("estimate-memory", "recipe.yaml", "--memory", "much"),
    ),
    Case(
        "an unknown GPU",
        as_it_is,
        2,
        r"^--gpu: `h100-90gb` is not known; near: h100-94gb,.*or give --memory, as --memory 24GiB$",
        command=("estimate-memory", "recipe.yaml", "--gpu", "h100-90gb"),
    ),
    Case(
        "an unknown model to estimate",
        as_it_is,
        4,
        r"^model\.name: no model `lama-70b` is known; near:.*folder with config\.json or a hub id$",
        command=("estimate-memory", "--model", "lama-70b"),
    ),
    Case(
        "nothing to estimate",
        as_it_is,
        2,
        r"^give a RECIPE or --model NAME; see `trainkit estimate-memory --help`$",
        command=("estimate-memory",),
    ),
    Case(
        "a precision to estimate that is none",
        as_it_is,
        2,
        r"^--precision: expected `fp32`, `fp16`, `bf16` or `auto`; got the text `fp8`$",
        command=("estimate-memory", "recipe.yaml", "--precision", "fp8"),
    ),
    Case(
        "an optimizer to estimate that is none",
        as_it_is,
        2,
        r"^--optimizer: expected `adamw`, `adamw_8bit`,.*text `adamv`; did you mean `adamw`\?$",
        command=("estimate-memory", "recipe.yaml", "--optimizer", "adamv"),
    ),
    Case(
        "a run to export that is not there",
        as_it_is,
        2,
        r"^runn: no such run folder; give the output_dir of a run$",
        command=("export", "runn", "--merge"),
    ),
    Case(
        "a run to export that is no run",
        as_it_is,
        2,
        r"^model: has no final/: the run is not finished; run trainkit fine-tune to its end$",
        command=("export", "model", "--merge"),
    ),
    Case(
        "export without a form",
        as_it_is,
        2,
        r"^export: model/final already is the result, in the.*makes one model of adapter and base$",
        command=("export", "model"),
    ),
    Case(
        "show of what is not there",
        as_it_is,
        2,
        r"^nowhere\.yaml: no such recipe; recipes that ship with trainkit: full, padded, quickstart$",
        command=("show", "nowhere.yaml"),
    ),
    Case(
        "no command but an option",
        as_it_is,
        2,
        r"^No such option: --json \(Possible options: --version\); see `trainkit --help`$",
        command=("--json",),
    ),
]
