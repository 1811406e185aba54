"""Versions of the registry: how they come about, who is champion, why, and what they were made from."""
