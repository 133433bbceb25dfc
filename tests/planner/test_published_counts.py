"""Parameter counts of published models, from their configurations alone, are those that their makers' files have."""

from typing import Any

import pytest
from transformers import AutoConfig

from fireflyds.models.load import bare_model
from fireflyds.optim.param_groups import count_parameters

TOWER_OF_GEMMA3 = 416_866_032 + 1152 * 5376 + 1152  # SigLIP at 896 pixels, and its projection


def sizes(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "vocab_size": vocab, "tie_word_embeddings": False,
    } | more  # fmt: skip


GEMMA3_27B = sizes(5376, 21504, 62, 32, 16, 262_208, head_dim=128, tie_word_embeddings=True)
# Model type, configuration, and the number of elements that the index of the published files sums to.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen3-8B": ("qwen3", sizes(4096, 12288, 36, 32, 8, 151_936, head_dim=128), 8_190_735_360),
    "Qwen3-32B": ("qwen3", sizes(5120, 25600, 64, 64, 8, 151_936, head_dim=128), 32_762_123_264),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        sizes(2048, 6144, 48, 32, 4, 151_936, head_dim=128, moe_intermediate_size=768, num_experts=128),
        30_532_122_624,
    ),
    "Llama-3.1-8B": ("llama", sizes(4096, 14336, 32, 32, 8, 128_256), 8_030_261_248),
    "Llama-3.1-70B": ("llama", sizes(8192, 28672, 80, 64, 8, 128_256), 70_553_706_496),
    "Gemma-3-27B": ("gemma3", {"text_config": GEMMA3_27B}, 27_432_406_640 - TOWER_OF_GEMMA3),
    "Mistral-Small-24B": ("mistral", sizes(5120, 32768, 40, 32, 8, 131_072, head_dim=128), 23_572_403_200),
    # The biases of its routers, 256 in each of 58 layers, are no parameters but buffers.
    "DeepSeek-V3": ("deepseek_v3", {}, 671_026_419_200 - 58 * 256),
    "gpt-oss-20b": (
        "gpt_oss", sizes(2880, 2880, 24, 64, 8, 201_088, head_dim=64, num_local_experts=32), 20_914_757_184
    ),
    "Baichuan2-13B": ("baichuan", sizes(5120, 13696, 40, 40, 40, 125_696, model_max_length=4096), 13_896_668_160),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "settings", "published"), PUBLISHED.values(), ids=PUBLISHED)
def test_parameters_of_published_models(model_type: str, settings: dict[str, Any], published: int) -> None:
    assert count_parameters(bare_model(AutoConfig.for_model(model_type, **settings)))[0] == published
