"""Folders on the disk: bundles, published checkpoints, and reading and writing them tensor by tensor."""
