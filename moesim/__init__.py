"""moesim: which expert-offloading policy serves a Mixture-of-Experts model best, with evidence."""

__version__ = "0.1.0"
