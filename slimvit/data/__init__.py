"""Images from a folder, in batches that are the same on every run and any number of processes."""

from slimvit.data._batches import Batches, loader
from slimvit.data._folder import ImageFolder, parse_subset
from slimvit.data._labels import NO_LABEL
from slimvit.data._transform import image_transform

__all__ = ["NO_LABEL", "Batches", "ImageFolder", "image_transform", "loader", "parse_subset"]
