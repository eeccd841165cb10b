"""What the local test tasks call; lmms-eval imports this file by its path."""


def images(doc):
    """None, one or two images, as benchmarks do."""
    return [image.convert("RGB") for image in doc["images"]] or None


def broken_images(doc):
    if doc["id"] == "doc3":
        raise OSError("image file is truncated")
    return images(doc)


def exact(doc, results):
    return {"accuracy": {"score": float(results[0] == doc["answer"]), "type": doc["type"], "id": doc["id"]}}


def next_round(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    """Documents take one, two or three rounds; each next question quotes the answer before."""
    if round_idx is None:
        return doc["question"]
    done = round_idx > doc["label"]
    return images(doc), f"You said {previous_output[-1]!r}. And now?", done, previous_output, {"round": round_idx}


def count_rounds(doc, results):
    return {"rounds": {"score": len(results[0]), "answers": results[0]}}


def mean(entries):
    return sum(entry["score"] for entry in entries) / len(entries)
