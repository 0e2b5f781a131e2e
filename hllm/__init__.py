"""HLLM: hierarchical LLM recommendation, from an interaction log to vectors that a ranking model reads."""

__version__ = "0.1.0"
