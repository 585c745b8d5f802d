"""People who talk, drawn here."""
