"""Named recipes, one TOML file each."""
