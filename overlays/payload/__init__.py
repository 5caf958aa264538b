"""Files of our own that bundles carry into vLLM as they are. They import nothing of this project."""
