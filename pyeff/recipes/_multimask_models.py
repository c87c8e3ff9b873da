"""The parts of an encoder that a pre-training needs: embeddings, layers, final norm, where the targets come from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyeff.nn import ConvDecoder1d, ConvDecoder2d, LayerStack, MultimaskStudent
from pyeff.plans import MaskPlan
from pyeff.recipes._multimask_settings import Settings
from pyeff.recipes._stacks import find_stacks

# What layers are given of positions by a model around them. Students see tokens of many places, and have no such thing.
_POSITIONS = ("position_bias", "position_embeddings", "rel_embeddings", "relative_pos", "sinusoidal_pos")
REFUSED = "supported are"
_FAMILY = (
    "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MiniLM, ELECTRA, DistilBERT, ERNIE, for images ViT, DeiT, DINOv2, ViT-MSN, "
    "I-JEPA, and what is built like them"
)
# What comes after the last layer, where there is something: of RoBERTa with norms first, of its larger kin; of images.
_FINAL_NORMS = {
    "text": ("LayerNorm", "encoder.LayerNorm"),
    "image": ("layernorm", "post_layernorm"),
}
_INPUTS = {"text": ("input_ids", "inputs_embeds"), "image": ("pixel_values",)}


@dataclasses.dataclass
class Parts:
    """An encoder, in pieces.

    Attributes:
        modality (str): "text" or "image".
        base (Module): the encoder without a head.
        embeddings (Module): inputs -> [B, prefix + T, D], positions added.
        stack (LayerStack): layers and final norm.
        prefix (int): how many leading tokens are no part of what is masked (a class token).
        width (int): D.
        patch (tuple of int, optional): height and width of a patch, for images.
    """

    modality: str
    base: nn.Module
    embeddings: nn.Module
    stack: LayerStack
    prefix: int
    width: int
    patch: tuple[int, int] | None = None

    def targets(self, kind: str) -> list[nn.Module]:
        """For each layer, the module whose output the students are to predict.

        Args:
            kind (str): "ffn" for what the feed-forward part adds to the residual, "layer" for what the layer returns,
                "auto" for the first of the two that there is.

        Raises:
            ValueError: "ffn" is asked for and not to be found.
        """
        layers = list(self.stack.layers)
        found = [None if kind == "layer" else _feed_forward(layer, self.width) for layer in layers]
        if None not in found:
            return [module for module in found if module is not None]
        if kind == "ffn":
            layer = type(layers[found.index(None)]).__name__
            raise ValueError(
                f"target is 'ffn' with layers of {layer}, expected layers with a module mlp, ffn, or output.dense; "
                "use 'layer'"
            )
        return layers

    def positions(self) -> Tensor | None:
        """What the embeddings add for each place behind the prefix, [at least T, D], or None if that is not known."""
        positions = getattr(self.embeddings, "position_embeddings", None)
        if isinstance(positions, nn.Embedding):
            # RoBERTa counts its positions from behind the padding's.
            first = positions.padding_idx
            return positions.weight if first is None else positions.weight[first + 1 :]
        return positions[0, self.prefix :] if isinstance(positions, Tensor) else None


def embed(embeddings: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, prefix + T, D] of a batch, with those of its entries that the embeddings know."""
    known = inspect.signature(embeddings.forward).parameters
    out = embeddings(**{name: value for name, value in inputs.items() if name in known})
    if not isinstance(out, Tensor):
        name = type(embeddings).__name__
        raise ValueError(f"model: {name} returns a {type(out).__name__}, expected embeddings that return [B, T, D]")
    return out


class Students(nn.Module):
    """What is trained: embeddings, the layers of :class:`pyeff.nn.MultimaskStudent`, decoder. One call for each batch.

    Everything that gets a gradient is in here and is used in every call, as DistributedDataParallel wants it.
    """

    def __init__(self, parts: Parts, decoder: nn.Module, noise_std: float, positions: bool) -> None:
        super().__init__()
        self.embeddings = parts.embeddings
        self.student = MultimaskStudent(parts.stack, decoder, prefix=parts.prefix, noise_std=noise_std)
        # Not a submodule once more.
        self._positions = [parts] if positions else []

    def forward(
        self, inputs: Mapping[str, Tensor], plan: MaskPlan, seed: Tensor, sample_ids: Tensor, ragged: bool
    ) -> tuple[Tensor, Tensor]:
        """Predictions [B*M, T, D] and the encoded prefix [B*M, prefix, D]."""
        if self._positions and inputs.get("position_ids") is not None:
            raise ValueError(
                "the batch has position_ids, expected none with positions=True, which counts hidden places from 0"
            )
        x = embed(self.embeddings, inputs)
        fill = self._positions[0].positions()[: plan.tokens] if self._positions else None  # type: ignore[index]
        return self.student(x, plan, seed=seed, sample_ids=sample_ids, positions=fill, ragged=ragged, with_prefix=True)


def _feed_forward(layer: nn.Module, width: int) -> nn.Module | None:
    """The module whose output is added to the residual last: of BERT and older ViTs, of ViT, of DistilBERT."""
    for path in ("output.dense", "mlp", "ffn"):
        module: Any = layer
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module) and getattr(module, "out_features", width) == width:
            return module
    return None


def described(base: nn.Module) -> str:
    """A model by its class and by the type that its configuration names."""
    kind = getattr(getattr(base, "config", None), "model_type", None)
    return type(base).__name__ + (f" (model type {kind!r})" if isinstance(kind, str) and kind else "")


def refusal(base: nn.Module, why: str) -> ValueError:
    """The error for a model that a pre-training cannot take apart."""
    return ValueError(f"model: {described(base)} {why}; {REFUSED} {_FAMILY}")


def find_parts(model: nn.Module, modality: str = "auto") -> Parts:
    """The parts of a Hugging Face encoder, or of a model around one.

    Args:
        model (Module): with ``embeddings``, and a stack of layers that take (states, attention mask).
        modality (str): "text", "image" or "auto", which looks at what the embeddings take.

    Raises:
        ValueError: the model is none of them; the message says what is missing.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected a torch.nn.Module, an encoder of Hugging Face")
    base = getattr(model, "base_model", model)
    name, config = type(base).__name__, getattr(base, "config", None)
    embeddings = getattr(base, "embeddings", None)
    if not isinstance(embeddings, nn.Module) or config is None:
        missing = "configuration" if isinstance(embeddings, nn.Module) else "module 'embeddings'"
        raise refusal(base, f"is without a {missing}")
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: the {name} is configured as a decoder, expected an encoder")
    takes = inspect.signature(embeddings.forward).parameters
    found = next((kind for kind, names in _INPUTS.items() if any(n in takes for n in names)), None)
    if found is None and modality == "auto":
        raise refusal(base, f"has embeddings that take {', '.join(takes)}, expected input_ids or pixel_values")
    if found is None or modality not in ("auto", found):
        came = f"take {', '.join(takes)}"
        raise ValueError(f"modality is {modality!r}, but the embeddings of {name} {came}; expected 'text' or 'image'")
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"model: the configuration of {name} has hidden_size {width!r}, expected an integer")
    if getattr(config, "embedding_size", width) != width:
        raise ValueError(
            f"model: the embeddings of {name} are {config.embedding_size} wide and projected to {width}, expected "
            "embeddings of the layers' width"
        )
    try:
        layers = find_stacks(base)["adapter"].layers
    except ValueError as error:
        raise refusal(base, f"has no one stack of layers ({error})") from error
    takes = inspect.signature(layers[0].forward).parameters
    if given := [name for name in _POSITIONS if name in takes]:
        raise refusal(
            base, f"has layers that take {given[0]}, expected positions that are in the embeddings: a student has a "
            "part of the tokens"
        )  # fmt: skip
    norm = next((m for m in (_at(base, path) for path in _FINAL_NORMS[found]) if m is not None), None)
    prefix, patch = 0, None
    if found == "image":
        prefix = _class_tokens(embeddings)
        size = getattr(getattr(embeddings, "patch_embeddings", embeddings), "patch_size", None)
        if size is None:
            raise ValueError(f"model: the embeddings of {name} have no patch_size, expected a vision transformer")
        patch = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return Parts(found, base, embeddings, LayerStack(layers, norm), prefix, width, patch)


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module if isinstance(module, nn.Module) else None


def _class_tokens(embeddings: nn.Module) -> int:
    """How many tokens come before the patches."""
    count = 0
    for name in ("cls_token", "register_tokens", "distillation_token"):
        token = getattr(embeddings, name, None)
        if isinstance(token, Tensor):
            count += token.shape[1]
    return count


def make_decoder(parts: Parts, settings: Settings) -> nn.Module:
    """The convolutions of the paper, of the encoder's width.

    Raises:
        ValueError: sizes that do not fit each other, or images whose size the model does not tell.
    """
    options = {
        "hidden": settings.decoder_width, "kernel": settings.decoder_kernel, "groups": settings.decoder_groups,
        "layers": settings.decoder_layers, "out": parts.width,
    }  # fmt: skip
    if parts.patch is None:
        return ConvDecoder1d(parts.width, **options)
    size = getattr(getattr(parts.embeddings, "patch_embeddings", parts.embeddings), "image_size", None)
    if size is None:
        raise ValueError("decoder is None for a model without an image_size, expected a decoder=")
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return ConvDecoder2d(parts.width, (height // parts.patch[0], width // parts.patch[1]), **options)


def idle_parameters(modules: nn.Module) -> list[str]:
    """Names of parameters that no pre-training uses: what a model puts in hidden places itself."""
    return [name for name, _ in modules.named_parameters() if name.rsplit(".", 1)[-1] == "mask_token"]


def maximal_tokens(parts: Parts, default: int = 512) -> int:
    """How many tokens a sample may have, but for its prefix."""
    if parts.patch is not None:
        count = getattr(getattr(parts.embeddings, "patch_embeddings", None), "num_patches", default)
        return int(count)
    positions = parts.positions()
    return default if positions is None else len(positions)
