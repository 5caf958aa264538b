"""A new version of engines through the fleet, one engine at a time: tried, compared with the old one, or taken back."""
