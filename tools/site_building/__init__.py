"""The hooks of mkdocs.yml, and the pages that they generate."""
