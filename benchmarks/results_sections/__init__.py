"""The sections of ``docs/results.md``: each function reads reports and returns Markdown."""
