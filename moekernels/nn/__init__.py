"""The model: parameters live here and only here."""
