"""The engine itself: scheduler, cache, batches, compiled layers and the sampler; nothing here speaks HTTP."""
