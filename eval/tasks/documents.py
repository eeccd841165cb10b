"""Whether an answer about a document is right.

lmms-eval imports this file by its path, so it stands on its own.
"""


def score(doc, results):
    """1.0 when the answer, or what stands behind its last colon, equals the target.

    Apart from case, white space and a stop at its end; 12.50 is not 1250.
    """
    said, expected = results[0], _plain(doc["answer"])
    right = expected in (_plain(said), _plain(said.rpartition(": ")[2]))
    return {"accuracy": {"score": float(right), "type": doc["type"], "id": doc["id"]}}


def _plain(text):
    return " ".join(text.lower().split()).removesuffix(".")
