"""Reinforcement learning across two pools."""

from isthmus.stages.rl.loop import execute as execute
