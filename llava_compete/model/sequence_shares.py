"""What a sequence counts in the routing losses where only supervised tokens are counted, as by Hugging Face's Trainer.

Our own trainer counts the samples and images of an optimizer step, and each is one in a mean. A trainer that hands on
`num_items_in_batch` alone does not: means over a micro-batch, summed over the micro-batches of a step, would grow with
their number. A sample then counts by its share of the step's supervised tokens, as in the language loss, and divides
its share among its images; any cut of the batch gives the same sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.parts import IGNORE_INDEX, Part


def sequences_by_labels(
    labels: Tensor,
    num_items: Tensor | int,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
    first_image_tokens: Tensor | None = None,
) -> dict[Part, Tensor]:
    """`num_sequences` of each part's `TokenGroups`: [S, 1], the inverse of each sequence's share.

    labels: [B, N]; num_items: supervised tokens of the whole step.
    sample_ids: [B, N], the sample of each token in packed rows, -1 for padding; None: each row is one.
    num_samples: samples in packed rows; None: read off `sample_ids`, which waits for the device.
    first_image_tokens: [I], where in [B, N] flattened each image begins; None without images.
    """
    if sample_ids is None:
        num_samples = len(labels)
        sample_ids = torch.arange(num_samples, device=labels.device)[:, None].expand_as(labels)
    elif num_samples is None:
        num_samples = int(sample_ids.max()) + 1
    samples_S1 = torch.arange(num_samples, device=labels.device)[:, None]
    # The label of a row's first token is never predicted.
    supervised_T = F.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0)).flatten()
    items_S1 = ((sample_ids.flatten() == samples_S1) & supervised_T).sum(1, keepdim=True)
    shares_S1 = items_S1 / torch.as_tensor(num_items, device=labels.device, dtype=torch.float32)
    sequences: dict[Part, Tensor] = {"language": 1 / shares_S1}
    if first_image_tokens is not None:
        shows_SI = (sample_ids.flatten()[first_image_tokens] == samples_S1).float()
        shares_I1 = shows_SI.t() @ (shares_S1 / shows_SI.sum(1, keepdim=True).clamp(min=1))
        sequences["vision"] = sequences["projector"] = 1 / shares_I1
    return sequences
