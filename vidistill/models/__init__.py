"""The one network behind teacher, critic and student, the causal student made of it, and low-rank adapters."""
