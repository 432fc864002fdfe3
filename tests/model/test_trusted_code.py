"""Whose code may be run: what the flag says, what the files of a repository may name, and what they may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainkit.errors import ModelError, UsageError
from trainkit.model.checking import check_code
from trainkit.model.loading import load_tokenizer
from trainkit.model.locating import locate_model
from trainkit.model.trusted_code import Trust, code_options, needs_code, place_in_trusted_code, read_trust
from trainkit.recipe.schema import Model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def trust_in(repository: Any) -> Trust:
    trust = read_trust(repository.trust)
    assert trust is not None
    return trust


# What the flag says


def test_the_flag_is_a_repository_and_a_whole_commit() -> None:
    assert read_trust(f"owner/name@{COMMIT}") == Trust("owner/name", COMMIT)
    assert read_trust(f"owner/name@{COMMIT.upper()}") == Trust("owner/name", COMMIT)
    assert read_trust(None) is None


@pytest.mark.parametrize("text", ["", "owner/name", COMMIT, f"@{COMMIT}", f"name@{COMMIT}", f"./folder@{COMMIT}"])
def test_what_names_no_repository_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--trust-remote-code: .* is not OWNER/NAME@COMMIT; write"):
        read_trust(text)


@pytest.mark.parametrize("commit", ["", "main", "v1.0", COMMIT[:7], COMMIT + "0", "g" * 40])
def test_what_is_no_whole_commit_is_refused(commit: str) -> None:
    with pytest.raises(UsageError, match=r"is no whole commit.*write all 40 hexadecimal digits$"):
        read_trust(f"owner/name@{commit}")


def test_code_is_pinned_to_the_commit_and_refused_without_trust() -> None:
    assert code_options(None) == {"trust_remote_code": False}
    assert code_options(Trust("a/b", COMMIT)) == {"trust_remote_code": True, "code_revision": COMMIT}


# Which models need it


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "unheard-of"}, False),
        ({"model_type": "unheard-of", "auto_map": {"AutoConfig": "a.B"}}, True),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "a.B"}},
            False,
        ),
        (
            {"model_type": "llama", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "a.B"}},
            True,
        ),
        ({"model_type": "llama", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoConfig": "a.B"}}, False),
    ],
)
def test_code_is_needed_where_transformers_has_none(config: dict[str, Any], needed: bool) -> None:
    assert needs_code(config) == needed


# Where the model must lie


def test_a_trusted_model_is_located_at_its_commit(own_llama: Any) -> None:
    for revision in (None, own_llama.commit, "main"):
        location = locate_model(Model(name=own_llama.name, revision=revision), trust_in(own_llama))
        assert location.code == trust_in(own_llama)
        assert (location.hub_id, location.revision) == (own_llama.name, own_llama.commit)
        assert location.folder == own_llama.path("")


def test_without_trust_a_location_has_no_code(own_llama: Any) -> None:
    assert locate_model(Model(name=own_llama.name)).code is None


def test_the_trusted_commit_is_taken_wherever_the_branch_stands(own_llama: Any) -> None:
    own_llama.refer("main", own_llama.other_commit)
    assert locate_model(Model(name=own_llama.name), trust_in(own_llama)).revision == own_llama.commit


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(name="tiny"), "tiny is no model of the hub: a folder has no commit"),
        (Model(name="./hub"), r"\./hub is no model of the hub: a folder has no commit"),
        (Model(name="hub"), "hub is no model of the hub: a folder has no commit"),
        (Model(name="owner/another"), "trusts owner/own-llama, and the model is owner/another"),
        (Model(name="owner/own-llama", revision="8" * 40), "model.revision is 8888"),
    ],
)
def test_a_trust_in_anything_else_is_refused(
    own_llama: Any, model: Model, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^--trust-remote-code: .*{message}"):
        locate_model(model, trust_in(own_llama))


def test_a_branch_that_stands_for_another_commit_is_refused(own_llama: Any) -> None:
    own_llama.refer("main", own_llama.other_commit)
    with pytest.raises(UsageError, match=f"model.revision is main, which is {own_llama.other_commit}; model and code"):
        locate_model(Model(name=own_llama.name, revision="main"), trust_in(own_llama))


# What the files may name


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("other/repository--modeling_own.OwnForCausalLM", "another repository .other/repository."),
        ("other--owner/own-llama--modeling_own.OwnForCausalLM", "another repository"),
        ("../modeling_own.OwnForCausalLM", "is no module.Class"),
        ("/elsewhere/modeling_own.OwnForCausalLM", "is no module.Class"),
        ("a/b.Own", "is no module.Class"),
        ("modeling_own", "is no module.Class"),
        (7, "is no module.Class"),
        ("absent.Own", "absent.py, which is not there"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_is_not_the_repositorys_own_is_refused(
    own_llama: Any, file: str, reference: Any, message: str
) -> None:
    for auto_map in ({"AutoModel": reference}, {"AutoTokenizer": [None, reference]}, [reference, None]):
        own_llama.edit_json(file, auto_map=auto_map)
        with pytest.raises(ModelError, match=message):
            check_code(own_llama.path(""), trust_in(own_llama))


def test_code_that_names_its_own_repository_is_its_own(own_llama: Any) -> None:
    own_llama.edit_json("config.json", auto_map={"AutoConfig": f"{own_llama.name}--configuration_own.OwnConfig"})
    check_code(own_llama.path(""), trust_in(own_llama))


# Tokenizers


def test_a_tokenizer_of_trusted_code_is_loaded(own_llama: Any) -> None:
    own_llama.give_tokenizer_code()
    tokenizer = load_tokenizer(locate_model(Model(name=own_llama.name), trust_in(own_llama)))
    assert type(tokenizer).__name__ == "OwnTokenizerFast"


def test_a_tokenizer_that_transformers_has_runs_no_code_even_where_it_may(own_llama: Any) -> None:
    own_llama.edit_json(
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )
    own_llama.write("tokenization_own.py", b"raise AssertionError('run')")
    load_tokenizer(locate_model(Model(name=own_llama.name), trust_in(own_llama)))


def test_a_tokenizer_whose_code_encodes_otherwise_is_refused(own_llama: Any) -> None:
    own_llama.give_tokenizer_code()
    code = own_llama.path("tokenization_own.py").read_text()
    changed = code.replace("    pass", "    def _encode_plus(self, *given, **named):\n        return {'input_ids': []}")
    own_llama.write("tokenization_own.py", changed.encode())
    with pytest.raises(ModelError, match="the code of its tokenizer has a `_encode_plus` of its own"):
        load_tokenizer(locate_model(Model(name=own_llama.name), trust_in(own_llama)))


# Failures of the code itself


def test_an_error_of_the_models_code_is_told_from_one_of_ours() -> None:
    theirs: dict[str, Any] = {"__name__": "transformers_modules.owner.name.modeling"}
    exec(compile("def fail(): raise TypeError('x')", "modeling.py", "exec"), theirs)
    with pytest.raises(TypeError) as caught:
        theirs["fail"]()
    assert place_in_trusted_code(caught.value) == "modeling.py:1"
    with pytest.raises(ValueError, match="Expecting value") as ours:
        json.loads("x")
    assert place_in_trusted_code(ours.value) is None
