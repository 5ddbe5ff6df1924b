"""Reports of runs: one HTML file with plots, warning signs and all stored questions; never imports torch."""

from .writing import write_report

__all__ = ["write_report"]
