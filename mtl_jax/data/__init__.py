"""Where examples come from: sources, augmentation, streams."""

from mtl_jax.data.source import ArrayExamples, Examples, Label, Source, Subset
