"""The web app behind `vidistill serve`: a page, frames, inputs and pacing; never tensors."""

from vidistill.serve.app import ServeConfig, create_app, load_world, run, serve
from vidistill.serve.viewer import ViewerConfig, World

__all__ = ["ServeConfig", "ViewerConfig", "World", "create_app", "load_world", "run", "serve"]
