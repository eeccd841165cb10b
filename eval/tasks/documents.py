"""Whether an answer about a document is right.

lmms-eval imports this file by its path, so it stands on its own.
"""


def score(doc, results):
    """1.0 when the answer equals the target, apart from case, white space and a stop at its end; 12.50 is not 1250."""
    return {
        "accuracy": {"score": float(_plain(results[0]) == _plain(doc["answer"])), "type": doc["type"], "id": doc["id"]}
    }


def _plain(text):
    return " ".join(text.lower().split()).removesuffix(".")
