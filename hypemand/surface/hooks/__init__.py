"""Commands of the operator that are run after runs."""
