"""Where a model lies: shipped with the package, in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import errno
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import MachineError, ModelError, UsageError, first_line
from trainkit.model.checking import check_code
from trainkit.model.trusted_code import COMMIT, FLAG
from trainkit.run_folder import expanded, leads_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainkit.model.trusted_code import Trust
    from trainkit.recipe.schema import Model


SHIPPED_MODELS = Path(__file__).resolve().parent.parent / "shipped" / "models"
SHIPPED_NAMES = ("tiny",)
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt"]
CODE_FILES = ["*.py"]


@dataclass(frozen=True)
class ModelLocation:
    """A model that lies on this machine.

    ``name`` is what the recipe says, ``folder`` an absolute path. ``hub_id`` and ``revision`` (a commit) are set for a
    model of the hub. ``code`` is set where the Python code that comes with it may be run; it then is that of
    ``hub_id`` and ``revision``.
    """

    name: str
    folder: Path
    revision: str | None = None
    hub_id: str | None = None
    code: Trust | None = None

    @property
    def reference(self) -> str:
        """What plain transformers code loads the model by, from any working folder: hub id or absolute path."""
        return self.hub_id or str(self.folder)

    @property
    def public_name(self) -> str:
        """The name without this machine's paths: for a model card that others read."""
        return self.hub_id or (self.name if self.name in SHIPPED_NAMES else self.folder.name)


def locate_model(model: Model, trust: Trust | None = None) -> ModelLocation:
    """The local folder of ``model``; a hub id is downloaded (safetensors, configuration and tokenizer only).

    With ``trust``, its Python files too, at that commit. Raises ModelError where there is no such folder, or where the
    hub does not give the model, and UsageError for a revision of a folder and for a trust in anything but this model.
    """
    if trust is not None:
        _check_trust(model, trust)
    if model.name in SHIPPED_NAMES:
        return ModelLocation(model.name, SHIPPED_MODELS / model.name)
    path = expanded(model.name)
    if path.is_dir():
        if model.revision is not None:
            raise UsageError(
                f"model.revision: {model.name} is a folder, and only models of the hub have revisions; leave it out"
            )
        check_entries(path)
        return ModelLocation(model.name, path.resolve())
    if path.exists():
        raise ModelError(f"model.name: {model.name} is a file; give the folder that it lies in")
    near = _nearest_folder(path)
    if near is not None or looks_like_path(model.name):
        hint = f"; did you mean {near}?" if near else "; give a folder, a hub id (owner/name) or `tiny`"
        raise ModelError(f"model.name: no such folder: {model.name}{hint}")
    return _from_hub(model.name, model.revision, trust)


def check_entries(folder: Path) -> None:
    """Raise ModelError for a file of a model folder that is a link out of it, or that is no file: a pipe, a device.

    Whatever a model folder holds may end up in a result that is given away: the tokenizer and its templates do.
    """
    entries = sorted(folder.iterdir())
    templates = folder / "additional_chat_templates"
    if templates.is_dir() and not leads_out(templates, folder):
        entries += sorted(templates.iterdir())
    for entry in entries:
        if leads_out(entry, folder):
            raise ModelError(
                f"{entry}: is a link to a file outside of its folder, and is not followed; copy the file here if it is "
                "meant to be read"
            )
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ModelError(f"{entry}: is neither a file nor a folder; take it away")


def looks_like_path(name: str) -> bool:
    """Whether a name is meant as a place on this machine rather than as a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _nearest_folder(path: Path) -> Path | None:
    parent = path.parent
    if not parent.is_dir():
        return None
    names = [entry.name for entry in parent.iterdir() if (entry / "config.json").is_file()]
    by_lower_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), by_lower_case, n=1, cutoff=0.75)
    return parent / by_lower_case[close[0]] if close else None


def download_config(name: str, revision: str | None) -> Path:
    """``config.json`` of a hub id, downloaded alone. Raises ModelError as :func:`locate_model` does."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    with _hub_failures(name, revision):
        try:
            return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))
        except hub.LocalEntryNotFoundError:  # a kind of the next, and another matter: nobody was asked
            raise
        except hub.EntryNotFoundError as error:
            raise ModelError(
                f"model.name: {name} has no config.json on the hub; is it a model for transformers?"
            ) from error


def _check_trust(model: Model, trust: Trust) -> None:
    """Raise UsageError unless the trust is in this model of the hub, at the commit that the recipe asks for."""
    is_folder = model.name in SHIPPED_NAMES or expanded(model.name).exists() or looks_like_path(model.name)
    if is_folder:
        raise UsageError(
            f"{FLAG}: {model.name} is no model of the hub: a folder has no commit that would say which code this is; "
            f"give {trust.repository} as the model, or leave the flag out"
        )
    if model.name != trust.repository:
        raise UsageError(
            f"{FLAG}: trusts {trust.repository}, and the model is {model.name}; code is run from no other repository "
            "than the model's own"
        )
    if model.revision is not None and COMMIT.fullmatch(model.revision.lower()):
        _check_commit(model.revision.lower(), model.revision, trust)


def _check_commit(commit: str, revision: str, trust: Trust) -> None:
    """Raise UsageError unless ``commit``, which the ``revision`` of the recipe stands for, is the trusted one."""
    if commit != trust.commit:
        stands_for = "" if commit == revision.lower() else f", which is {commit}"
        raise UsageError(
            f"{FLAG}: trusts the commit {trust.commit}, and model.revision is {revision}{stands_for}; model and code "
            "are taken from one commit"
        )


def _from_hub(name: str, revision: str | None, trust: Trust | None) -> ModelLocation:
    if trust is not None:
        if revision is not None:
            _check_commit(download_config(name, revision).parent.name, revision, trust)
        revision = trust.commit
    with _hub_failures(name, revision):
        patterns = HUB_FILES if trust is None else HUB_FILES + CODE_FILES
        folder = _snapshot(name, revision, patterns)
    if trust is not None:
        if folder.name != trust.commit:  # a branch may be called like a commit
            raise ModelError(
                f"{FLAG}: the hub has no commit {trust.commit} of {name}, but a branch or tag of that name"
            )
        check_code(folder, trust)
    return ModelLocation(name, folder, revision=folder.name, hub_id=name, code=trust)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a hub id, downloaded where it is not in the hub's cache. Raises what the hub client raises."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        # For a commit, client 1.33 asks the hub what belongs to it, unless it downloaded that itself.
        with suppress(hub.LocalEntryNotFoundError):
            return Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=patterns, local_files_only=True
                )
            )
        raise


@contextmanager
def _hub_failures(name: str, revision: str | None) -> Iterator[None]:
    """Everything that the hub may refuse, as our own errors."""
    from huggingface_hub import errors as hub

    local = "or give model.name a local folder"
    try:
        yield
    except (ModelError, MachineError):
        raise
    except hub.HFValidationError as error:
        raise ModelError(f"model.name: {name} is neither a folder here nor a hub id (owner/name)") from error
    except hub.GatedRepoError as error:
        raise ModelError(
            f"model.name: {name} is gated: accept its terms on https://huggingface.co/{name}, then run "
            f"`hf auth login`, {local}"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name: the hub has no model {name}, or it is private (`hf auth login`); check the name, {local}"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"model.revision: {name} has no branch, tag or commit {revision!r}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise ModelError(
            f"model.name: {name} is no folder here and cannot be fetched from the hub (offline, or the hub does not "
            "answer); give a local folder"
        ) from error
    except Exception as error:  # what the HTTP library raises has changed with every major version of the hub client
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise MachineError(
                f"model.name: the disk is full while {name} is fetched; set HF_HOME elsewhere"
            ) from error
        reason = first_line(error)
        raise ModelError(f"model.name: {name} cannot be fetched from the hub ({reason}); try again, {local}") from error
