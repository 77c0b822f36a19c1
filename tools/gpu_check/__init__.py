"""Measures what a machine with an NVIDIA GPU does: ``python -m medusa_deploy.tools.gpu_check --out DIR``. See docs/gpu_check.md."""
