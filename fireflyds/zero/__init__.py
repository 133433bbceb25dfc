"""The one door to DeepSpeed: its configuration, its engine, and the partitions that a rank holds."""
