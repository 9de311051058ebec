"""ViT: timm's names."""

from topgap_jax.pretrained.names.naming import Naming

TIMM = {
    "patches": "patch_embed.proj",
    "class_token": "cls_token",
    "registers": "reg_token",
    "positions": "pos_embed",
    "block/norm1": "blocks.{i}.norm1",
    "block/attention/qkv": "blocks.{i}.attn.qkv",
    "block/attention/project": "blocks.{i}.attn.proj",
    "block/norm2": "blocks.{i}.norm2",
    "block/dense1": "blocks.{i}.mlp.fc1",
    "block/dense2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
    "head": "head",
}

NAMINGS = {"timm vit": Naming(TIMM)}
