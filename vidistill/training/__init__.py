"""A training stage: its settings, losses, rollouts, optimisers, validation, and the loop that runs them."""
