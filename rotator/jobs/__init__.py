"""Nomad jobs as values: recipes and a site file in, the text of a job and of its variables out. Talks to nobody."""

from rotator.jobs.findings import Finding, JobsError
from rotator.jobs.recipe import Recipe, load_catalogue, load_recipe
from rotator.jobs.render import Rendered, render, render_all, render_text
from rotator.jobs.site import Site, load_site

__all__ = [
    "Finding",
    "JobsError",
    "Recipe",
    "Rendered",
    "Site",
    "load_catalogue",
    "load_recipe",
    "load_site",
    "render",
    "render_all",
    "render_text",
]
