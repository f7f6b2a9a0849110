"""Programs that measure; each writes a JSON document that names machine, versions and input."""
