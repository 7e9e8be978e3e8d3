"""What the scripts do: verbs, one file for each script."""
