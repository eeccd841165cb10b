"""Functions that the emoji task YAMLs name: the pictures, and whether an answer is right.

lmms-eval imports this file by its path, so it stands on its own.
"""

import re

_WORDS = re.compile(r"[a-z0-9'-]+")


def images(doc):
    """The document's pictures in order; the model's own processor makes them RGB, as in training."""
    return list(doc["images"])


def score(doc, results):
    """1.0 when the answer is right: what stands behind its last colon, or for `describe` a sentence with the name."""
    said, expected = _words(results[0].rpartition(":")[2]), _words(doc["answer"])
    if doc["type"] == "describe":
        right = any(said[start : start + len(expected)] == expected for start in range(len(said)))
    else:
        right = said == expected
    return {"accuracy": {"score": float(right), "type": doc["type"], "id": doc["id"]}}


def _words(text):
    return _WORDS.findall(text.lower())
