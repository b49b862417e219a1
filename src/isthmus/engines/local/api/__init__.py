"""The HTTP service around the core: the OpenAI-compatible API, keys, limits, metrics, canaries and weight updates."""
