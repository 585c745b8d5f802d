"""KV memory: what a student remembers of finished frames, what it costs, what stays. No attention maths."""
