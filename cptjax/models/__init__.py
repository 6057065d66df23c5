"""The network as pure functions over nested dicts, attention back ends, LoRA, checkpoint conversion and loading."""
