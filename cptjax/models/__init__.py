"""Network, attention back ends, LoRA, log-probabilities, loading and Hugging Face checkpoints."""
