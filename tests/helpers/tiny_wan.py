"""A tiny Wan in diffusers' layout: transformer, autoencoder, UMT5 and a tokenizer of a few words."""

import json

import torch

TEXT, LENGTH = 20, 8  # width of a token, tokens a prompt is padded to
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
WORDS = "a red fox runs over snow two boats at night blurred"


def transformer(seed=0, std=0.15, **changes):
    """A `WanTransformer3DModel` whose head is not zero."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = WanTransformer3DModel(**{**TRANSFORMER, **changes}).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=std)
    return net.requires_grad_(False)


def autoencoder(channels=16):
    """Wan 2.1's autoencoder in miniature, or 2.2's: 48 channels, 16 px a side."""
    from diffusers import AutoencoderKLWan

    small = {"decoder_base_dim": 8, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    small |= {"latents_mean": [0.1] * 48, "latents_std": [0.9] * 48, "scale_factor_spatial": 16}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = AutoencoderKLWan(base_dim=8, z_dim=channels, num_res_blocks=1, **(small if channels == 48 else {}))
    return net.eval().requires_grad_(False)


def write_text(folder):
    """`tokenizer` and `text_encoder` in `folder`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS.split())])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sizes = {"d_model": TEXT, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder / "text_encoder")


IMAGE = {"in_channels": 36, "image_dim": 12, "added_kv_proj_dim": 24}  # of an image-to-video transformer


def write_image_encoder(folder):
    """`image_encoder` and `image_processor` in `folder`: CLIP in miniature, with the 257 tokens of the real one."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": IMAGE["image_dim"], "intermediate_size": 16, "num_hidden_layers": 3}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=2))
    net.save_pretrained(folder / "image_encoder")
    shown = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**shown).save_pretrained(folder / "image_processor")


def write_wan(folder, channels=16, image=False):
    """All of it, with latents of so many channels, or an image-to-video network with its CLIP; returns `folder`."""
    sizes = IMAGE if image else {"in_channels": channels, "out_channels": channels}
    transformer(**sizes).save_pretrained(folder / "transformer")
    if image:
        write_image_encoder(folder)
    autoencoder(channels).save_pretrained(folder / "vae")
    write_text(folder)
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
