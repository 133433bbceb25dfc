"""Falcon: rotary or ALiBi attention in one projection, without transformers' attention interface."""

from fireflyds.types import Family

FAMILY = Family(
    model_type="falcon",
    linear_layers=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    fused={"FalconAttention": "falcon_attention"},
)
