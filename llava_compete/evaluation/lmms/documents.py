"""What a score needs to know of each document and lmms-eval does not write: which image it shows, what was asked.

lmms-eval drops the document before it writes a sample, so the model that answers leaves these lines beside lmms-eval's
files, one file a rank. From the image comes the group of a question (questions about one image are not independent:
treated as such, 500 images of 18 questions reject a true null in 21% of cases at a nominal 5%), from all of a task's
documents the digest by which two evaluations are known to have asked the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from llava_compete.errors import UserError
from llava_compete.files import read_json_lines

# The launcher names the folder in the environment: model_args cannot hold every path (',' and '=').
FOLDER_VARIABLE = "LLAVA_COMPETE_DOCUMENTS"


class DocumentFacts(NamedTuple):
    """One document as it was shown.

    Attributes:
        images: digest of the pixels of all its images; None without an image.
        question: digest of its prompt and of its images' sizes. Not of their pixels: two versions of a JPEG decoder
            may differ in a last bit, and would then be told that they answered other questions.
    """

    images: str | None
    question: str


class DocumentWriter:
    """Collects the facts of the documents that one rank shows; documents shown again (a choice each) count once."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._facts: dict[tuple[str, int], DocumentFacts] = {}

    def saw(self, task: str, doc_id: int, prompt: str, images: Sequence[Image.Image]) -> None:
        """Note a document; in a conversation of several rounds the first counts."""
        if self._folder is not None and (task, doc_id) not in self._facts:
            self._facts[task, doc_id] = document_facts(prompt, images)

    def write(self, rank: int) -> None:
        """Append what was seen since the last time to the rank's own file."""
        if self._folder is None or not self._facts:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"documents.{rank}.jsonl").open("a", encoding="utf-8") as file:
            for (task, doc_id), facts in self._facts.items():
                file.write(json.dumps({"task": task, "doc_id": doc_id, **facts._asdict()}) + "\n")
        self._facts.clear()


def document_facts(prompt: str, images: Sequence[Image.Image]) -> DocumentFacts:
    """See `DocumentFacts`."""
    sizes = [image.size for image in images]
    pixels = hashlib.sha256(json.dumps([image.mode for image in images]).encode())
    for image in images:
        pixels.update(image.tobytes())
    return DocumentFacts(pixels.hexdigest()[:16] if images else None, _digest([prompt, sizes]))


def read_documents(folder: Path) -> dict[tuple[str, int], DocumentFacts]:
    """By task and document id, what all ranks wrote."""
    found = {}
    for path in sorted(folder.glob("documents.*.jsonl")):
        for line in read_json_lines(path):
            found[line["task"], line["doc_id"]] = DocumentFacts(line["images"], line["question"])
    return found


def add_documents(task: str, samples: Iterable[dict[str, Any]], documents: dict[tuple[str, int], DocumentFacts]) -> str:
    """Put `group` on each sample of a task, and return the digest of all that was asked.

    A sample whose document nobody wrote down is a `UserError`: its group would silently be lost.
    """
    asked = []
    for sample in samples:
        facts = documents.get((task, sample["doc_id"]))
        if facts is None:
            raise UserError(f"task {task!r}, document {sample['doc_id']}: an answer, but no record of its question")
        sample["group"] = facts.images
        asked.append([sample["doc_id"], facts.question, str(sample.get("target"))])
    return _digest(sorted(asked))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
