"""The image towers of CLIP and DINOv2 as Hugging Face's `transformers` names their tensors, in timm's names.

Both families of names are read that `transformers` has had for DINOv2: that of the published files, and that of its
fifth version. Of a file of all of CLIP the text tower is left out.
"""

import re
from collections.abc import Mapping

import numpy as np

# The text tower, the scale of its products with images, the numbers of positions, and the token of masked training.
_LEFT_OUT = re.compile(r"text_model\.|text_projection\.|logit_scale$|embeddings\.(position_ids|mask_token)$")
_RULES = (
    (r"^(dinov2(_with_registers)?|vision_model)\.", ""),
    (r"^embeddings\.(class_embedding|cls_token)$", "cls_token"),
    (r"^embeddings\.(position_embedding\.weight|position_embeddings)$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(patch_embedding|patch_embeddings\.projection)\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),  # spelt like this there
    (r"^(post_layernorm|layernorm)\.", "norm."),
    (r"^encoder\.layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(self_attn|attention)\.(out_proj|o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.(self_attn|attention|attention\.attention)\.(q|k|v)(_proj|uery|ey|alue)\.", r".attn.\2."),
)


def in_timm_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of an image tower by timm's names: query, key and value in one, tokens `[1, n, C]`.

    Tensors of other names stay as they are.
    """
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        if not _LEFT_OUT.match(name):
            found[name] = tensor.reshape(1, -1, tensor.shape[-1]) if name in ("cls_token", "pos_embed") else tensor
    for name in [name for name in found if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if set(parts) <= set(found):
            found[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([found.pop(part) for part in parts])
    return found
