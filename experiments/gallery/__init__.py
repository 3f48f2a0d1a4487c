"""Networks to develop on: written as their users write them, without a line of the library, and trained on real data."""

from experiments.gallery.entries import GALLERY
from experiments.gallery.entry import Examples, GalleryNetwork, PlainRecipe, Splits

__all__ = ["GALLERY", "Examples", "GalleryNetwork", "PlainRecipe", "Splits"]
