"""Fifty secrets, planted where secrets lie, and looked for in everything that a command says and leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainkit.cli import run
from trainkit.recipe.secrets import holds_secret, without_secrets

MARK = "planted0secret"
"""Stands in every secret, so that a part of one is found too."""

OF_ENVIRONMENT = {
    name: f"{MARK}-{number:02}-of-the-environment"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "MLFLOW_TRACKING_PASSWORD",
            "MLFLOW_TRACKING_TOKEN",
            "COMET_API_KEY",
            "OPENAI_API_KEY",
            "ANTHROPIC_API_KEY",
            "GOOGLE_API_KEY",
            "MISTRAL_API_KEY",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AZURE_CLIENT_SECRET",
            "GITHUB_TOKEN",
            "GITLAB_PRIVATE_TOKEN",
            "GH_PAT",
            "DATABASE_PASSWORD",
            "SSH_PASSWD",
            "NPM_TOKEN",
            "KAGGLE_KEY_SECRET",
            "DOCKER_CREDENTIAL",
        )
    )
}
SHAPED = [
    f"hf_{MARK}abcdefghijklmnop",
    f"sk-{MARK}-abcdefghijklmnop",
    f"sk_live_{MARK}abcdefghijkl",
    f"ghp_{MARK}abcdefghijklmnop",
    f"gho_{MARK}abcdefghijklmnop",
    f"github_pat_{MARK}_abcdefghijkl",
    f"glpat-{MARK}-abcdefghijkl",
    f"AKIA{MARK.upper()}AB",
    f"xoxb-{MARK}-123456",
    f"AIza{MARK}{'x' * 21}",
    f"npm_{MARK}{'x' * 22}",
    f"pypi-{MARK}-abcdefghijkl",
    "dapi" + "0123456789abcdef" * 2,
    f"eyJ{MARK}.eyJ{MARK}.{MARK}",
    f"-----BEGIN RSA PRIVATE KEY----- {MARK}",
    f"https://me:{MARK}@example.org/train.jsonl",
    f"s3://key:{MARK}@bucket/train.jsonl",
    f"https://:{MARK}@example.org/x",
    f"https://example.org/x?token={MARK}",
    f"https://example.org/x?a=1&X-Amz-Signature={MARK}",
    f"Bearer {MARK}abcdefgh",
]
IN_HOME = {
    ".netrc": f"machine huggingface.co login me password {MARK}-of-netrc\n",
    ".cache/huggingface/token": f"{MARK}-of-the-hub",
    ".config/wandb/settings": f"api_key = {MARK}-of-wandb\n",
    ".aws/credentials": f"[default]\naws_secret_access_key = {MARK}-of-aws\n",
    ".ssh/id_ed25519": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{MARK}-of-ssh\n",
    ".kaggle/kaggle.json": f'{{"key": "{MARK}-of-kaggle"}}',
    ".git-credentials": f"https://me:{MARK}-of-git@example.org\n",
}


def test_fifty_are_planted() -> None:
    assert len(OF_ENVIRONMENT) + len(SHAPED) + len(IN_HOME) == 50


def leaks(folder: Path, *texts: str) -> list[str]:
    """Where a part of a secret stands: a file, by its content or its name, or a stream."""
    parts = (MARK, MARK.upper(), "0123456789abcdef")
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(path) for path in files if any(part.encode() in path.read_bytes() for part in parts)]
    found += [str(path) for path in folder.rglob("*") if any(part in path.name for part in parts)]
    return found + [text for text in texts if any(part in text for part in parts)]


def test_a_run_with_its_result_keeps_nothing_of_the_environment_and_the_home_folder(room: Any) -> None:
    home = room.outside / "home"
    for name, content in IN_HOME.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    room.environment |= OF_ENVIRONMENT | {"HOME": str(home), "NETRC": str(home / ".netrc")}
    room.set("tracking", ["tensorboard"])
    for arguments in (
        ["fine-tune", "recipe.yaml", "--json"],
        ["export", "run", "--merge"],
        ["pack-data", "recipe.yaml", "--format", "parquet", "--output", "packed"],
        ["inspect-data", "recipe.yaml"],
        ["show", "recipe.yaml"],
    ):
        done = room.run(*arguments)
        assert done.code == 0, done.stderr
        assert not leaks(room.folder, done.stdout, done.stderr)
        assert not room.escapes(done)
    made = {path.name for path in (room.folder / "run").rglob("*")}
    wanted = {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "README.md",
        "run.json",
    }
    assert made >= wanted | {"state.json", "manifest.json", "adapter_config.json", "tensorboard"}


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that could run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the lazy dog"}) + "\n")
    recipe = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": "train.jsonl"},
        "training": {"steps": 1, "tokens_per_step": 128},
        "packing": {"sequence_length": 64, "overlap": 8},
        "output_dir": "run",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize("secret", SHAPED)
@pytest.mark.parametrize(
    "key", ["data.train", "model.name", "output_dir", "data.chat_template", "an_unknown_key", "training.seed"]
)
def test_a_recipe_with_a_secret_is_refused_and_not_repeated(
    place: Path, key: str, secret: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    *sections, name = key.split(".")
    target = recipe
    for section in sections:
        target = target[section]
    target[name] = secret
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe, width=1000))
    for command in ("fine-tune", "show", "pack-data", "inspect-data", "estimate-memory"):
        assert run([command, "recipe.yaml"]) == 2
    said = capfd.readouterr()
    assert said.err.count("holds what looks like an access token or a password") == 5
    (place / "recipe.yaml").unlink()
    assert not leaks(place, said.out, said.err)
    assert [path.name for path in place.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("secret", SHAPED)
def test_a_command_line_with_a_secret_is_refused_and_not_repeated(
    place: Path, secret: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [
        ["fine-tune", "recipe.yaml", "--set", f"data.train={secret}"],
        ["fine-tune", "recipe.yaml", f"--hub-token={secret}"],
        ["fine-tune", secret],
        ["pack-data", "recipe.yaml", "--output", secret],
        ["pack-data", "--data", secret, "--tokenizer", "model"],
        ["estimate-memory", "--model", secret, "--debug"],
        ["export", secret, "--merge"],
    ]
    for line in lines:
        assert run(line) == 2
    said = capfd.readouterr()
    assert not leaks(place, said.out, said.err)
    assert said.err.count("error: argument ") == len(lines)


def test_a_recipe_with_the_value_of_a_secret_variable_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", f"{MARK}-without-a-shape")
    with (place / "recipe.yaml").open("a") as file:
        file.write(f"tracking: [{MARK}-without-a-shape]\n")
    assert run(["show", "recipe.yaml"]) == 2
    said = capfd.readouterr()
    assert MARK not in said.out + said.err


def test_a_crash_report_holds_none_of_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in OF_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def fails(*_: object) -> str:
        everything = [*OF_ENVIRONMENT.values(), *SHAPED]  # a local variable, which no report shows
        raise RuntimeError(f"for {everything}") from ValueError(" ".join(everything))

    monkeypatch.setattr("trainkit.commands.show.show", fails)
    assert run(["show", "recipe.yaml", "--debug"]) == 1
    said = capfd.readouterr()
    (crash,) = place.glob("trainkit-crash-*.txt")
    assert "RuntimeError: for [" in crash.read_text()
    for secret in [*OF_ENVIRONMENT.values(), *SHAPED]:
        kept = secret if secret in OF_ENVIRONMENT.values() else without_secrets(secret)
        assert secret not in crash.read_text() + said.err, kept


def test_an_error_that_quotes_a_secret_says_it_without(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainkit.errors import DataError

    def fails(*_: object) -> str:
        raise DataError(f"401 for {SHAPED[0]} at {SHAPED[15]}")

    monkeypatch.setattr("trainkit.commands.show.show", fails)
    assert run(["show", "recipe.yaml"]) == 3
    assert capfd.readouterr().err == "error: 401 for *** at https://***@example.org/train.jsonl\n"


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/a/b:c hf_config",
        "s3://bucket/folder/train.jsonl",
        "runs/2026-01-01T10:00@machine",
        "meta-llama/Llama-3.1-8B",
        "/data/hf_models/token-classification",
        "sk-learn",
        "https://example.org/x?split=train&page=2",
        "user@example.org",
        "q_proj,k_proj",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text
    assert not holds_secret(text)


def test_the_path_of_a_file_with_a_token_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/models")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert not holds_secret("/home/me/models/llama: false")
