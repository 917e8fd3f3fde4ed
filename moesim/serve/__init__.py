"""Requests that arrive: when they come, how long they are, who is served, and how well."""
