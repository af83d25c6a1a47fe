"""A compression run: its configuration, its checks, its stages, and what they leave on disk."""
