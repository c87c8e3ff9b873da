"""Whether the parts of an encoder, one after another, compute what the encoder does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff.recipes._multimask_models import REFUSED, Parts, embed, maximal_tokens, refusal

# Far above rounding, TF32's too, and far below what a missing part does.
_TOLERANCE = 1e-2
# The same kernels on the same numbers in another order.
_TURNED = 1e-3
_TOKENS = 8


def check_parts(parts: Parts, target: str, device: torch.device) -> None:
    """Raises ValueError unless embeddings and layers, called one by one, are the encoder, and layers know no order.

    An encoder may do more than its parts show: attend in blocks of a fixed length, mix neighbours, call one layer often
    (BigBird, Longformer, FNet, ALBERT). Two short samples of other lengths, one of them padded, or one image, tell.
    """
    kind = getattr(parts.base.config, "_attn_implementation", None)
    if device.type == "meta" or kind not in (None, "sdpa", "eager"):
        return  # attention that takes no mask, or half precision alone
    modes = {module: module.training for module in parts.base.modules()}
    parts.base.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            _check(parts, target, device)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(parts: Parts, target: str, device: torch.device) -> None:
    base = parts.base
    found = _sample(parts, device)
    if found is None:
        return
    inputs, lengths = found
    outputs: list[Any] = []
    modules = parts.targets(target)
    handles = [m.register_forward_hook(lambda module, given, out: outputs.append(out)) for m in modules]
    tokens = parts.prefix + lengths[0]
    try:
        states = embed(parts.embeddings, inputs)
        if states.dim() != 3 or states.shape[1:] != (tokens, parts.width):
            raise refusal(
                base, f"has embeddings that give {list(states.shape)}, expected {[len(states), tokens, parts.width]}: "
                f"{parts.prefix} class tokens and {lengths[0]} others"
            )  # fmt: skip
        mask = None
        if len(lengths) > 1:
            at = torch.arange(tokens, device=device)
            mask = (at < torch.tensor(lengths, device=device)[:, None])[:, None, None]
        own = parts.stack(states, mask)
        targets = [list(t.shape) for t in (o if isinstance(o, Tensor) else o[0] for o in outputs)]
        backwards = torch.arange(tokens - 1, -1, -1, device=device)
        first, turned = parts.stack(states[:1]), parts.stack(states[:1, backwards])[:, backwards]
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # says nothing about the model
        raise
    except Exception as error:
        if REFUSED in str(error):
            raise
        what = (str(error).splitlines() or [""])[0]
        raise refusal(
            base, f"has embeddings or layers that cannot be called by themselves ({type(error).__name__}: {what})"
        ) from error  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    if targets != [list(states.shape)] * len(modules):
        raise refusal(base, f"gives targets of shapes {targets}, expected {len(modules)} of {list(states.shape)}")
    if (turned - first).norm() > _TURNED * first.norm():
        raise refusal(
            base, "has layers that know the order of tokens, expected positions that are in the embeddings: a student "
            "has a part of the tokens"
        )  # fmt: skip
    _compare(parts, inputs, lengths, own)


def _compare(parts: Parts, inputs: dict[str, Tensor], lengths: Sequence[int], own: Tensor) -> None:
    """Each sample against the encoder's own output for it alone, without padding."""
    for i, length in enumerate(lengths):
        cut = parts.prefix + length
        alone = {n: t[i : i + 1] if parts.patch is not None else t[i : i + 1, :length] for n, t in inputs.items()}
        try:
            whole = getattr(parts.base(**alone), "last_hidden_state", None)
        except Exception:  # it wants more than its embeddings do: nothing to compare with
            return
        if not isinstance(whole, Tensor) or not whole.isfinite().all():
            return
        same = whole.shape == own[i : i + 1, :cut].shape
        if not same or not (own[i : i + 1, :cut] - whole).norm() <= _TOLERANCE * whole.norm():
            raise refusal(
                parts.base, "computes something else than its embeddings and its layers, one after another (and "
                "without regard to padding)"
            )  # fmt: skip


def _sample(parts: Parts, device: torch.device) -> tuple[dict[str, Tensor], list[int]] | None:
    """(inputs, tokens of each sample); of no generator that others draw from."""
    config: Any = parts.base.config
    generator = torch.Generator().manual_seed(0)
    dtype = next(p.dtype for p in parts.base.parameters() if p.is_floating_point())
    if parts.patch is not None:
        place = getattr(parts.embeddings, "patch_embeddings", parts.embeddings)
        size = getattr(place, "image_size", None) or (4 * parts.patch[0], 4 * parts.patch[1])
        size = (size, size) if isinstance(size, int) else tuple(size)
        image = torch.randn(1, getattr(config, "num_channels", 3), *size, generator=generator, device="cpu")
        tokens = (size[0] // parts.patch[0]) * (size[1] // parts.patch[1])
        return {"pixel_values": image.to(device, dtype)}, [tokens]
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return None
    length = min(_TOKENS, maximal_tokens(parts))
    ids = torch.randint(vocabulary, (2, length), generator=generator, device="cpu")
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int):
        ids = torch.where(ids == pad, (pad + 1) % vocabulary, ids)
    lengths = [length, max(length - 3, 1)]
    ids[1, lengths[1] :] = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
    return {"input_ids": ids.to(device)}, lengths
