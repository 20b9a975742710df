"""The pytest plugin; filled by the kit."""
