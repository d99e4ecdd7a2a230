"""Pages of one HTML file each, which ask no network for anything: `templates/` has their forms."""
