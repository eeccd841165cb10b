"""Held-out loss during training, and a few greedy answers: exact over ranks, safe under ZeRO-3.

Under ZeRO-3 a part that one rank skips leaves the others waiting. So every rank runs the same number of forwards, each
over rows of one source, and the vision tower in all of them. What a row holds is known only once it is read (a turn
that is cut takes its image along, a bad picture puts another row in its place): a batch without images then gets a
blank one. A rank out of rows repeats one, with no label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llava_compete.data.collator import on_device
from llava_compete.parts import IGNORE_INDEX


@torch.no_grad()
def validation_loss(
    model: nn.Module, dataset: Any, collate: Any, *, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Mean cross-entropy (nats) over all supervised tokens of `dataset`, their number, and each source's own mean."""
    was_training = model.training
    model.eval()
    totals_S2 = torch.zeros(len(dataset.source_names), 2, dtype=torch.float64, device=device)
    for source, batch in _equal_batches(dataset, collate, batch_size):
        targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        inputs = on_device(batch, device)
        # Divided by one item, the model's loss is the sum over tokens.
        loss_sum = model(**inputs, num_items_in_batch=1).lm_loss
        totals_S2[source] += torch.stack([loss_sum.double(), targets.to(device).double()])
    if dist.is_initialized():
        dist.all_reduce(totals_S2)
    model.train(was_training)
    (loss_sum, tokens), by_source = totals_S2.sum(0).tolist(), totals_S2.tolist()
    losses = {f"eval_loss/{name}": s / n for name, (s, n) in zip(dataset.source_names, by_source, strict=True) if n}
    return {"eval_loss": loss_sum / max(tokens, 1.0), "eval_tokens": tokens, **(losses if len(losses) > 1 else {})}


def _equal_batches(dataset: Any, collate: Any, batch_size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(source, batch), as many on every rank; with images in all batches, if any row of the data set has one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    filler = dataset.image_filler()
    for source in np.unique(dataset.sources):
        rows = np.flatnonzero(dataset.sources == source)
        for start in range(0, len(rows), world * batch_size):
            mine = rows[start : start + world * batch_size][rank::world]
            items = [dataset[int(row)] for row in (mine if len(mine) else rows[:1])]
            if filler is not None and all(item["pixel_values"] is None for item in items):
                items.append(filler)
            batch = collate(items)
            if not len(mine):
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            yield int(source), batch


@torch.no_grad()
def greedy_answers(
    model: Any, dataset: Any, processor: Any, *, count: int, device: torch.device, synced: bool
) -> list[dict[str, str]]:
    """Question, expected and generated text of the first `count` held-out rows, up to their first answer's end."""
    was_training = model.training
    model.eval()
    answers = []
    for row in range(min(count, len(dataset))):
        item = dataset[row]
        supervised = item["labels"] != IGNORE_INDEX
        start = int(supervised.nonzero()[0, 0])
        end = start + int(supervised[start:].cumprod(0).sum())
        prompt = item["input_ids"][:start].unsqueeze(0).to(device)
        placeholders = int((prompt == model.config.image_token_id).sum())
        generated = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **_images_before(model, item, placeholders, device),
            max_new_tokens=max(end - start, 16),
            do_sample=False,
            synced_gpus=synced,
        )
        decode = processor.tokenizer.decode
        texts = (decode(prompt[0]), decode(item["input_ids"][start:end]), decode(generated[0, start:]))
        answers.append(dict(zip(("prompt", "expected", "generated"), texts, strict=True)) | {"id": item["sample_id"]})
    model.train(was_training)
    return answers


def _images_before(model: Any, item: dict[str, Any], placeholders: int, device: torch.device) -> dict[str, Any]:
    """The images of a row that its first placeholders show."""
    pixels, sizes = item["pixel_values"], item.get("image_sizes")
    if pixels is None or not placeholders:
        return {}
    tiles, lengths = model.image_lengths(pixels, sizes)
    images = int(np.searchsorted(np.cumsum(lengths), placeholders)) + 1
    shown = {"pixel_values": pixels[: sum(tiles[:images])].to(device)}
    return shown if sizes is None else {**shown, "image_sizes": sizes[:images]}
