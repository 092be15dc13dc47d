"""A whole model on several GPUs of one node, where one does not hold it: consecutive blocks share a GPU, and states move along."""

from __future__ import annotations

import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import PreTrainedModel

Place = int | str | torch.device
FREE_SHARE = 0.85
"""Share of the free memory of a GPU that weights may take; the rest is for states, keys, values and logits."""


def places(model: PreTrainedModel, device: torch.device) -> dict[str, Place]:
    """Choose where the parts of a model go.

    Args:
        model: The model, which may be on the meta device. Its tied weights are tied, so that they stay together.
        device: The device of a model that is not spread.

    Returns:
        Part -> its device; one entry for everything if one device holds it.

    Raises:
        torch.OutOfMemoryError: All visible GPUs together do not hold the model.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count <= 1:
        return {"": device}
    free = {index: int(FREE_SHARE * torch.cuda.mem_get_info(index)[0]) for index in range(count)}
    whole = list(model._no_split_modules or ())
    model.tie_weights()
    found: dict[str, int] = infer_auto_device_map(model, max_memory=free, no_split_module_classes=whole)
    if not set(found.values()) <= set(free):
        raise torch.OutOfMemoryError(
            f"the weights do not fit into {FREE_SHARE:.0%} of the free memory of {count} GPUs "
            f"({sum(free.values()) / 2**30:.0f} GiB): give the cell more or larger ones (resources.gpus, resources.gpu_mem_gib)"
        )
    used = sorted(set(found.values()))
    return dict(found) if len(used) > 1 else {"": torch.device("cuda", used[0])}


def place_of(part: str, chosen: dict[str, Place]) -> Place:
    """The device of a part, which may be that of the whole that it belongs to."""
    while part not in chosen:
        part = part.rpartition(".")[0]
    return chosen[part]


def spread(model: PreTrainedModel, chosen: dict[str, Place]) -> PreTrainedModel:
    """Move a model to its places, and let states move with it from one device to the next."""
    if len(chosen) == 1:
        return model.to(chosen[""])  # type: ignore[arg-type, return-value]
    found: PreTrainedModel = dispatch_model(model, chosen)
    return found
