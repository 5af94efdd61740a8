"""The basement: the same results, faster, safer and on any LLM. It never changes a result."""
