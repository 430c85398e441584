"""Serving: what stands between clients and a guard."""
