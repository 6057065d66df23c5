"""cptjax: continual post-training of Qwen2.5-VL in JAX."""
