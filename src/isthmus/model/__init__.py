"""The model: DeepSeek-V3 architecture, with the published tensor names."""
