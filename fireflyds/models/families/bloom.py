"""BLOOM: ALiBi attention in one projection, without transformers' attention interface."""

from fireflyds.types import Family

FAMILY = Family(
    model_type="bloom",
    linear_layers=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    fused={"BloomAttention": "bloom_attention"},
)
