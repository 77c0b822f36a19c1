"""Measures what a machine with an NVIDIA GPU does, stage by stage: ``python -m medusa_deploy.tools.gpu_check --out DIR``.

docs/gpu_check.md says what to bring, what each stage measures and how long it takes at most.
"""
