"""What several test files share. Tests import from here, never from each other."""
