"""Functions that the demo task YAMLs name: the image, exact match, and the mean.

lmms-eval imports this file by its path, so it stands on its own. A sample's `accuracy` entry carries its question type
and id, from which `llava_compete.evaluation.lmms.output_files` makes the breakdown by type.
"""

import string

_IGNORED = str.maketrans("", "", string.punctuation)


def image(doc):
    """The document's one image, as a list of PIL images; the model's own processor makes it RGB, as in training."""
    return [doc["image"]]


def exact_match(doc, results):
    """1.0 when the answer equals the target, apart from case, punctuation and white space around it."""
    answer = results[0].translate(_IGNORED).strip().lower()
    score = float(answer == doc["answer"].translate(_IGNORED).strip().lower())
    return {"accuracy": {"score": score, "type": doc["type"], "id": doc["id"]}}


def mean_score(entries):
    """Mean of the scores."""
    return sum(entry["score"] for entry in entries) / len(entries)
