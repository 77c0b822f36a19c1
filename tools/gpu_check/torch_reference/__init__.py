"""The step in plain torch, for machines where no executor can run a bundle. Stages import it when they run."""
