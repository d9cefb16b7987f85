"""Models by their library's name: ``hf:distilbert-base-uncased`` (or a config.json), ``timm:vit_tiny_patch16_224``.

Only the architecture is taken, with random weights: tuning needs no others. Their inputs are made up, of the sizes that
the model says it is for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from autotune.data.synthetic import sample_lengths
from autotune.errors import AutotuneError, UsageError
from autotune.files import replace_file
from autotune.store import cache_dir

TEXT_BATCH, IMAGE_BATCH = 32, 64
MAX_TOKENS = 512
"""Sequences are made up to so many tokens, fewer where the model takes fewer."""

DEFAULTS = {
    "distilbert-base-uncased": "distilbert",
    "distilbert/distilbert-base-uncased": "distilbert",
    "bert-base-uncased": "bert",
    "google-bert/bert-base-uncased": "bert",
    "gpt2": "gpt2",
    "openai-community/gpt2": "gpt2",
}
"""Models that are their architecture's default configuration in transformers: known without the hub."""

Made = tuple[nn.Module, dict[str, torch.Tensor]]


def hugging_face(name: str) -> Made:
    """A sequence classifier from a config.json (its path, or its folder's) or from a model's name, and a batch for it.

    Raises UsageError where transformers is missing or no configuration can be had.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("hf: models need transformers: pip install 'autotune-torch[hf]'") from None
    config = _config(name)
    try:
        classifiers: Any = transformers.AutoModelForSequenceClassification
        model = classifiers.from_config(config)
    except ValueError as exc:
        raise UsageError(f"hf:{name} cannot be built as a sequence classifier: {str(exc).splitlines()[0]}") from exc
    if config.pad_token_id is None:
        model.config.pad_token_id = 0
    model.config.use_cache = False  # keys and values kept for generating would be written again by recomputation
    generator = torch.Generator().manual_seed(0)
    max_tokens = min(MAX_TOKENS, getattr(config, "max_position_embeddings", MAX_TOKENS) or MAX_TOKENS)
    lengths = torch.from_numpy(sample_lengths(TEXT_BATCH, seed=0)).clamp(max=max_tokens)
    lengths[0] = max_tokens  # so that the batch has its full width
    mask = torch.arange(max_tokens) < lengths[:, None]
    ids = torch.randint(1, config.vocab_size, mask.shape, generator=generator)
    batch = {
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "labels": torch.randint(0, config.num_labels, (TEXT_BATCH,), generator=generator),
    }
    return model, batch


def timm_model(name: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """An image classifier by timm's name, a batch of images of its size, and their classes.

    Raises UsageError where timm is missing or knows no such model.
    """
    try:
        import timm
    except ImportError:
        raise UsageError("timm: models need timm: pip install 'autotune-torch[vision]'") from None
    try:
        model = timm.create_model(name, pretrained=False)
    except RuntimeError as exc:
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise UsageError(f"timm has no model {name!r}{hint}") from exc
    generator = torch.Generator().manual_seed(0)
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    images = torch.randn(IMAGE_BATCH, channels, height, width, generator=generator)
    return model, (images, torch.randint(0, model.num_classes, (IMAGE_BATCH,), generator=generator))


def _config(name: str) -> Any:
    """The configuration at a path, else the one that an earlier call kept, else the hub's, else what is known without.

    Raises UsageError where none of these has it.
    """
    import transformers

    path = Path(name)
    if path.exists():
        return transformers.AutoConfig.from_pretrained(path)
    kept = cache_dir() / "hugging-face" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"
    if kept.exists():
        return transformers.AutoConfig.from_pretrained(kept)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as exc:
        kind = DEFAULTS.get(name)
        if kind is None:
            reason = next(iter(str(exc).splitlines()), type(exc).__name__)
            raise UsageError(
                f"no configuration for hf:{name} can be had ({reason}); give a config.json: --model hf:PATH"
            ) from exc
        config = transformers.AutoConfig.for_model(kind)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, msgspec.json.encode(config.to_dict()))
    except OSError as exc:
        raise AutotuneError(f"the cache folder {cache_dir()} cannot be written: {exc.strerror or exc}") from exc
    return config
