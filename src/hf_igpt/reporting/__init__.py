"""Records shown: pictures and reports."""
