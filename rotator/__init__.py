"""The sleep/wake model-rotation service: one OpenAI endpoint over more vLLM engines than the GPUs can hold."""

__version__ = "0.1.0"
