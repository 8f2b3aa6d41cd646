"""Models of transformers with a few random weights, saved as users' folders are."""

from __future__ import annotations

import json

import torch

PIXELS, MEAN, STD = 16, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save_preprocessor(folder, **settings):
    """A preprocessor_config.json."""
    content = {"size": {"height": PIXELS, "width": PIXELS}, "image_mean": MEAN, "image_std": STD, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def vit_folder(folder):
    """A vision transformer."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=PIXELS, patch_size=8)).eval()
    model.save_pretrained(folder)
    save_preprocessor(folder)
    return model


def clip_folder(folder):
    """A CLIP whose tokenizer knows the letters of a few words."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    special = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, **special, "vocab_size": len(words), "max_position_embeddings": 12},
            vision_config={**sizes, "image_size": PIXELS, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    model.save_pretrained(folder)
    save_preprocessor(folder)
    return model
