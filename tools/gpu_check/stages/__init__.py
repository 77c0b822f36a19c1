"""One module a stage, with a function ``run(options, report)``; :mod:`..worker` finds it by its name."""
