"""Registered versions: lineage, gate, champion, promotion and rollback."""
