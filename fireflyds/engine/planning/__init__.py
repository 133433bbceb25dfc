"""What a run would need: FLOPs, memory, time, disk; what fits and what is fastest."""
