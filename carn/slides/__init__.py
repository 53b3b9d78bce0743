"""Whole-slide images: open, read regions, find tissue, write pyramids."""

from carn.slides.opening import cached_slide, open_image, open_slide
from carn.slides.slide import Level, Slide

__all__ = ["Level", "Slide", "cached_slide", "open_image", "open_slide"]
