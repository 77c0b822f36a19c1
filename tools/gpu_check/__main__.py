"""``python -m medusa_deploy.tools.gpu_check``."""

from .runner import main

if __name__ == "__main__":
    raise SystemExit(main())
