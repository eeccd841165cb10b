"""A model in another dtype, as transformers' loader would have made it in that dtype."""

from __future__ import annotations

from typing import Any

import torch


def cast(model: Any, dtype: torch.dtype) -> Any:
    """`model`, in place, in `dtype`; what its language model computes for itself and stores nowhere stays as it is.

    `Module.to` would round the frequencies of rotary embeddings, by up to 0.4% in bfloat16: an angle off by a radian
    some hundred tokens away, and not what the language model was trained with, nor what a load of its files has.
    """
    own = [
        (module, name, buffer)
        for module in model.language_model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in own:
        module._buffers[name] = buffer
    return model
