"""The verbs: one file for each script in `scripts/`. Nothing else in the package imports from here."""
