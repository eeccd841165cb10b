"""A checkpoint on a hub: its own files with a card that also has the data and the scores."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from llava_compete.errors import UserError
from llava_compete.evaluation.checkpoint_facts import checkpoint_facts
from llava_compete.files import read_json
from llava_compete.model.card import model_card, recorded_data, write_card
from llava_compete.model.checkpoint import MODEL, own_files, read_config, read_weight_headers
from llava_compete.model.hub_errors import HUB_ERRORS

_WEIGHTS = f"{MODEL}*.safetensors*"


def push(checkpoint: Path, repo: str, evaluations: Sequence[Path] = (), private: bool = True) -> str:
    """Upload a checkpoint's own files (no run logs, no optimizer states) as one commit; returns its address.

    Weights of an earlier upload that have other names now go with it; all else that is there stays.

    evaluations: directories of `llava-compete eval` whose scores the card shows; default: those inside the checkpoint.
    The hub and the token are huggingface_hub's (HF_ENDPOINT, HF_TOKEN or `hf auth login`).

    Raises:
        UserError: no checkpoint, damaged weights, or whatever the hub refuses.
    """
    config = read_config(checkpoint)
    read_weight_headers(checkpoint)
    given = list(evaluations) or [path.parent for path in sorted(checkpoint.glob("eval*/summary.json"))]
    digest = checkpoint_facts(checkpoint)["sha256"] if given else None
    scores = [row for folder in given for row in read_scores(folder, digest)]
    write_card(checkpoint, model_card(config, repo, recorded_data(checkpoint), scores))
    files = {path.name: path for path in own_files(checkpoint)}
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        # transformers takes a single file before shards: those of an earlier upload would be loaded.
        stale = [name for name in api.list_repo_files(repo) if fnmatch(name, _WEIGHTS) and name not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        operations += [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, path) for name, path in files.items()]
        # Not `upload_folder`: it cuts a long upload into several commits, between which files do not belong together.
        commit = api.create_commit(repo, operations, commit_message=f"Upload {checkpoint.resolve().name}")
    except HUB_ERRORS as error:
        raise UserError(f"{repo}: not uploaded: {' '.join(str(error).split())[:400]}") from error
    return str(commit.commit_url)


def read_scores(folder: Path, digest: str | None) -> list[list[Any]]:
    """Rows (benchmark, accuracy, chance, questions) of an evaluation of the checkpoint whose files have this digest.

    Raises:
        UserError: no evaluation, or one of other files, or with an adapter beside them.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise UserError(f"{folder}: no evaluation here (no summary.json)")
    summary = read_json(path)
    evaluated = summary.get("checkpoint") or {}
    if evaluated.get("sha256") not in (None, digest):
        raise UserError(
            f"{path}: found an evaluation of {evaluated.get('path')} with other files (sha256), expected one of the "
            "checkpoint as it is; evaluate it again, or remove that folder"
        )
    if evaluated.get("adapter_sha256"):
        raise UserError(f"{path}: found an evaluation with an adapter, expected one of the checkpoint alone")
    tasks = summary.get("tasks", {})
    return [[name, task.get("accuracy"), task.get("chance"), task.get("n")] for name, task in tasks.items()]
