"""The embedded tiny backbone."""
