"""Scores without a judge for two benchmarks whose lmms-eval tasks ask one (named by the *_exact.yaml files here)."""

import os
import re


def hallusion(doc, results):
    """HallusionBench: the first word says yes or no; `gt_answer` is "1" for yes."""
    word = re.match(r"\W*(yes|no)\b", results[0].lower())
    score = float(word is not None and (word[1] == "yes") == (str(doc["gt_answer"]) == "1"))
    name = "_".join(str(doc[key]) for key in ("category", "subcategory", "set_id", "figure_id", "question_id"))
    return {"accuracy": {"score": score, "type": doc["subcategory"], "id": name}}


def _mathvista():
    """lmms-eval's own MathVista: its import makes a judge's client, which wants a key though nothing is asked of it."""
    os.environ.setdefault("OPENAI_API_KEY", "unused")
    from lmms_eval.tasks.mathvista import utils

    return utils


def mathvista_image(doc):
    """MathVista's picture, as lmms-eval shows it."""
    return _mathvista().mathvista_doc_to_visual(doc)


def mathvista_prompt(doc, lmms_eval_specific_kwargs=None):
    """MathVista's question, as lmms-eval asks it."""
    return _mathvista().mathvista_doc_to_text(doc, lmms_eval_specific_kwargs)


def mathvista(doc, results):
    """MathVista: the benchmark's own normalisation of the answer as it stands."""
    mathvista_evaluator = _mathvista().mathvista_evaluator
    # The data set stores decimals as a float, with which `round` of lmms-eval's rules fails: no float were ever right.
    precision = None if doc["precision"] is None else int(doc["precision"])
    found = mathvista_evaluator.normalize_extracted_answer(
        _said(doc, results[0].strip()), doc["choices"], doc["question_type"], doc["answer_type"], precision
    )
    score = float(found is not None and mathvista_evaluator.safe_equal(found, doc["answer"]))
    return {"accuracy": {"score": score, "type": doc["question_type"], "id": str(doc["pid"])}}


def _said(doc, text):
    """What of an answer MathVista's rules are to read: a letter or an option, a list, or the last number."""
    if doc["question_type"] == "multi_choice":
        letter = re.match(r"\(?([A-Z])\)?(?:[.:\s]|$)", text)
        return f"({letter[1]})" if letter and text not in doc["choices"] else text
    if doc["answer_type"] == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        return lists[-1] if lists else text
    numbers = re.findall(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)", text)
    return numbers[-1].replace(",", "") if numbers else text
